"""One step's state of a rank as one flat buffer, and the memory that holds a few of them.

Layout of a buffer: the tensors of `checkpoint.shares.run_tensors`, one after the other, each at a
multiple of 64 bytes; then the JSON of what is no tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..tensors.fill import raw_bytes
from ..tensors.shard import shard_of

ALIGN = 64
KEPT = 2
"""Generations in memory: the newest may be incomplete when a rank is lost."""
GRAIN = 1 << 20
"""Buffers are whole multiples, so that JSON of a few bytes more asks for no new memory: touching that
for the first time takes eight times as long as the copy."""


@dataclass(kw_only=True, slots=True)
class Slot:
    """Room for one generation."""

    step: int | None = None
    """Optimizer steps done in it; None: empty, or being written."""
    buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """[n] uint8, host memory."""
    used: int = 0
    """Bytes of `buffer` that count."""
    digest: int = 0
    """xxh3 of them, 64 bits."""

    def reserve(self, num_bytes: int, *, pin: bool = False) -> Tensor:
        """Begin to write: the first `num_bytes` of the buffer, allocated anew only to grow."""
        self.step = None
        if self.buffer.numel() < num_bytes:
            room = -(-num_bytes // GRAIN) * GRAIN
            self.buffer = torch.empty(room, dtype=torch.uint8, pin_memory=pin)
        self.used = num_bytes
        return self.buffer[:num_bytes]

    def bytes(self) -> Tensor:
        """[used] uint8."""
        return self.buffer[: self.used]

    def intact(self) -> bool:
        """Whether the bytes still are what was written."""
        return self.step is not None and digest_of(self.bytes()) == self.digest


class Shelf:
    """The newest generations of one rank."""

    def __init__(self) -> None:
        self.slots = [Slot() for _ in range(KEPT)]

    def oldest(self) -> Slot:
        """The slot to overwrite."""
        return min(self.slots, key=lambda slot: -1 if slot.step is None else slot.step)

    def at(self, step: int) -> Slot | None:
        """The generation of a step."""
        return next((slot for slot in self.slots if slot.step == step), None)

    def steps(self) -> list[int]:
        """Steps of the generations that are intact; a damaged one is dropped."""
        for slot in self.slots:
            if slot.step is not None and not slot.intact():
                slot.step = None
        return sorted(slot.step for slot in self.slots if slot.step is not None)

    def count(self) -> int:
        """Generations that are there."""
        return sum(slot.step is not None for slot in self.slots)

    def drop_after(self, step: int) -> None:
        """Forget what is newer than the state that all ranks went back to."""
        for slot in self.slots:
            if slot.step is not None and slot.step > step:
                slot.step = None


class DamagedError(RuntimeError):
    """A generation is not what was sent, or of another layout; another one may do."""


class State:
    """This rank's tensors, in a fixed order, as they lie in a buffer."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.locals = {name: shard_of(tensor).local.detach() for name, tensor in tensors.items()}
        self._index: dict[str, tuple[int, str, list[int]]] = {}
        end = 0
        for name, local in self.locals.items():
            self._index[name] = (end, str(local.dtype).removeprefix("torch."), list(local.shape))
            end += -(-local.nbytes // ALIGN) * ALIGN
        self.num_bytes = end
        """Bytes of the tensors in a buffer."""
        self._pin = any(local.device.type == "cuda" for local in self.locals.values())
        self._views: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def pack(self, slot: Slot, meta: Mapping[str, Any], *, step: int) -> None:
        """Copy the tensors and some JSON into a slot; `step` optimizer steps are done."""
        header = {"tensors": self._index, "tensor_bytes": self.num_bytes, "meta": meta}
        words = json.dumps(header).encode()
        tail = words + len(words).to_bytes(8, "little")
        buffer = slot.reserve(self.num_bytes + len(tail), pin=self._pin)
        torch._foreach_copy_(self._views_of(buffer), list(self.locals.values()), non_blocking=True)
        buffer[self.num_bytes :].copy_(torch.frombuffer(bytearray(tail), dtype=torch.uint8))
        if self._pin:
            torch.cuda.synchronize()
        slot.step = step

    @torch.no_grad()
    def unpack(self, slot: Slot) -> None:
        """Copy a slot into the tensors.

        Raises:
            DamagedError: the slot is of another layout.
        """
        found = {name: tuple(entry) for name, entry in _header(slot)["tensors"].items()}
        for name in sorted(found.keys() | self._index.keys()):
            if found.get(name) != self._index.get(name):
                raise DamagedError(
                    f"a generation has {name} as {found.get(name)}, this layout as {self._index.get(name)}"
                )
        torch._foreach_copy_(list(self.locals.values()), self._views_of(slot.bytes()))

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        """The tensors' places in a buffer; the same two or three buffers come again and again."""
        key = buffer.data_ptr()
        if key not in self._views:
            self._views[key] = [
                buffer[start : start + local.nbytes].view(local.dtype).view(local.shape)
                for (start, _, _), local in zip(self._index.values(), self.locals.values(), strict=True)
            ]
        return self._views[key]


def seal(slot: Slot) -> None:
    """Compute the digest of a slot that has been written."""
    slot.digest = digest_of(slot.bytes())


def meta_of(slot: Slot) -> dict[str, Any]:
    """The JSON that `pack` was given."""
    meta: dict[str, Any] = _header(slot)["meta"]
    return meta


def digest_of(data: Tensor) -> int:
    """Xxh3 of bytes, 64 bits, signed so that it fits an int64."""
    found = xxhash.xxh3_64_intdigest(raw_bytes(data))
    return found - 2**64 if found >= 2**63 else found


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Digest of each of this rank's shards."""
    return {name: digest_of(shard_of(t).local.detach().contiguous().cpu()) for name, t in tensors.items()}


def _header(slot: Slot) -> dict[str, Any]:
    whole = slot.bytes()
    size = int.from_bytes(raw_bytes(whole[-8:].clone()), "little")
    header: dict[str, Any] = json.loads(bytes(raw_bytes(whole[-8 - size : -8].clone())))
    return header
