"""Every rank's newest states in the memory of other ranks, sent while the next step is computed.

A rank sends to `(rank + shift) % size` for every shift and keeps what it receives for as many owners.
A generation is begun only when every rank has received what it keeps of the one before, so that some
complete generation of all ranks exists at every moment.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Group, Pending

from .generations import DamagedError, Shelf, Slot, digest_of, seal
from .placement import Agreement, Inventory


@dataclass(kw_only=True, slots=True)
class Memory:
    """What this process remembers; it outlives a membership."""

    own: Shelf = field(default_factory=Shelf)
    """Of this rank."""
    held: dict[int, Shelf] = field(default_factory=dict)
    """Owner -> of that rank."""

    def inventory(self) -> dict[str, Any]:
        """Intact generations, as JSON."""
        held = {str(owner): shelf.steps() for owner, shelf in self.held.items()}
        return {"own": self.own.steps(), "held": held}

    def forget(self) -> None:
        """Drop all generations; their room stays."""
        for shelf in (self.own, *self.held.values()):
            shelf.drop_after(-1)

    def num_bytes(self) -> int:
        """Host memory in use."""
        shelves = [self.own, *self.held.values()]
        return sum(slot.buffer.nbytes for shelf in shelves for slot in shelf.slots)


class Replication:
    """Replicates one run; made anew for every membership."""

    def __init__(
        self,
        memory: Memory,
        group: Group,
        shifts: Sequence[int],
        *,
        strike: Callable[[int], None] | None = None,
    ) -> None:
        """Set up; every rank of the world calls it.

        Args:
            memory: of this process.
            group: all ranks, over host memory; nothing else communicates through it.
            shifts: of `placement.shifts`; empty: generations stay in this process.
            strike: called between the halves of a generation, with its step.
        """
        self._memory, self._group, self._strike = memory, group, strike
        rank, size = group.rank, group.size
        self._holders = [(rank + shift) % size for shift in shifts]
        self._owners = [(rank - shift) % size for shift in shifts]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longctx-replicate")
        self._last: Future[None] | None = None
        self._leaving: list[Pending] = []
        self.skipped = 0
        """Generations that were left out because the one before was still on its way."""

    @property
    def complete(self) -> bool:
        """Whether this rank has received what it keeps of the last generation.

        Raises:
            PeerLost: it cannot.
        """
        if self._last is None:
            return True
        if self._last.done():
            self._last.result()
            return True
        return False

    def send(self, slot: Slot) -> None:
        """Start to send a generation; every rank must have said that the last one is complete.

        Until then what was sent of it may be on its way, and gloo forgets a send whose handle is dropped.
        """
        self._leaving.clear()
        self._last = self._thread.submit(self._send_generation, slot, self._holders, self._owners)

    def replenish(self, agreement: Agreement, inventories: Sequence[Inventory]) -> None:
        """After a recovery: give the holders what they lack of the step that all went back to."""
        me, step = self._group.rank, agreement.step

        def lacks(holder: int, owner: int) -> bool:
            return step not in inventories[holder].held.get(owner, ())

        slot = self._memory.own.at(step)
        assert slot is not None, "the state was restored from it"
        holders = [holder for holder in self._holders if lacks(holder, me)]
        owners = [owner for owner in self._owners if lacks(me, owner)]
        self._last = self._thread.submit(self._send_generation, slot, holders, owners)

    def fetch(self, agreement: Agreement) -> None:
        """Move states from where they are to the ranks that lost theirs.

        Raises:
            DamagedError: what arrived is not what was kept.
        """
        me, step = self._group.rank, agreement.step
        for shelf in (self._memory.own, *self._memory.held.values()):
            shelf.drop_after(step)
        sends = []
        for rank, source in enumerate(agreement.source):
            if source == me and rank != me:
                held = self._memory.held.get(rank)
                slot = (held.at(step) if held else None) or self._memory.own.at(step)
                assert slot is not None, "the inventory named it"
                sends.append((rank, slot))
        source = agreement.source[me]
        receives = [(source, self._memory.own.oldest())] if source != me else []
        self._transfer(sends, receives, strike=None)

    def wait(self) -> None:
        """Return when this rank has received what it keeps of the last generation."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread; a transfer that waits for a lost peer has been cut."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _send_generation(self, slot: Slot, holders: Sequence[int], owners: Sequence[int]) -> None:
        seal(slot)
        step = slot.step
        receives = [(owner, self._memory.held.setdefault(owner, Shelf()).oldest()) for owner in owners]
        strike = None if self._strike is None or step is None else self._strike
        self._transfer([(holder, slot) for holder in holders], receives, strike=strike)

    def _transfer(
        self,
        sends: Sequence[tuple[int, Slot]],
        receives: Sequence[tuple[int, Slot]],
        *,
        strike: Callable[[int], None] | None,
    ) -> None:
        headers = [torch.tensor([s.step, s.used, s.digest], dtype=torch.int64) for _, s in sends]
        coming = [torch.zeros(3, dtype=torch.int64) for _ in receives]
        self._post([(rank, header) for (rank, _), header in zip(sends, headers, strict=True)])
        self._post([(rank, _half(slot.bytes(), 0)) for rank, slot in sends])
        self._take([(rank, header) for (rank, _), header in zip(receives, coming, strict=True)])
        targets = [slot.reserve(int(h[1])) for (_, slot), h in zip(receives, coming, strict=True)]
        self._take([(rank, _half(target, 0)) for (rank, _), target in zip(receives, targets, strict=True)])
        if strike is not None and sends:
            strike(int(headers[0][0]))
        self._post([(rank, _half(slot.bytes(), 1)) for rank, slot in sends])
        self._take([(rank, _half(target, 1)) for (rank, _), target in zip(receives, targets, strict=True)])
        for (rank, slot), header in zip(receives, coming, strict=True):
            step, _, digest = header.tolist()
            if digest_of(slot.bytes()) != digest:
                raise DamagedError(f"the state of step {step} from rank {rank} arrived damaged")
            slot.digest, slot.step = digest, step

    def _post(self, sends: list[tuple[int, Tensor]]) -> None:
        """Send without waiting: what is received last says that all has arrived.

        A send that gloo is given in the moment in which a connection breaks ends at its timeout alone.
        """
        sends = [(rank, tensor) for rank, tensor in sends if tensor.numel()]
        self._leaving.append(comm.exchange(sends, [], self._group, kind="replicate"))

    def _take(self, receives: list[tuple[int, Tensor]]) -> None:
        receives = [(rank, tensor) for rank, tensor in receives if tensor.numel()]
        comm.exchange([], receives, self._group, kind="replicate").wait()


def _half(data: Tensor, which: int) -> Tensor:
    middle = -(-data.numel() // 2)
    return data[middle:] if which else data[:middle]
