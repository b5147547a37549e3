"""Which tensors a run has, who writes which part of them, and copies that may be written later."""

from dataclasses import dataclass
from typing import Any

import torch

from parallel import comm

from ..build import Run
from ..errors import CheckpointError
from ..tensors.dtypes import ITEM_BYTES, SHORT_NAMES, file_dtype
from ..tensors.fill import raw_bytes
from ..tensors.header import Piece
from ..tensors.shard import shard_of
from ..tensors.writer import Item

_MOMENTS = ("exp_avg", "exp_avg_sq")


def run_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Parameters and AdamW moments by global name; missing moments are created as zeros."""
    tensors: dict[str, torch.Tensor] = {}
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        if id(parameter) not in optimized:
            raise CheckpointError(f"{name} is not what the optimizer updates: the model is still gathered")
        slots = run.optimizer.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in _MOMENTS:
                slots[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        tensors[f"model.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"optim.{name}.{moment}"] = slots[moment]
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What this rank writes, and the description of the whole; the same at every save of a run."""

    names: tuple[str, ...]
    """Tensors of which this rank writes its shard."""
    tensors: dict[str, dict[str, Any]]
    """Every tensor's shape and dtype, over all ranks."""
    num_bytes: int
    """Bytes of the whole."""


def share_of(run: Run) -> Share:
    """Divide the writing: a shard that several ranks hold is written by one, so that all write alike.

    Raises:
        CheckpointError: the ranks' shards do not make up a tensor.
    """
    held = comm.gather_json(_boxes(run_tensors(run)), group=run.mesh.group("world"))
    tensors: dict[str, dict[str, Any]] = {}
    for boxes in held:  # a pipeline stage has some of the names
        for name, (shape, dtype, _, _) in boxes.items():
            tensors.setdefault(name, {"shape": shape, "dtype": dtype})
    writers = _writers(held, tensors)
    sizes = {name: _elements(entry["shape"]) for name, entry in tensors.items()}
    return Share(
        names=tuple(name for name, ranks in writers.items() if run.world.rank in ranks),
        tensors=tensors,
        num_bytes=sum(n * ITEM_BYTES[SHORT_NAMES[tensors[name]["dtype"]]] for name, n in sizes.items()),
    )


def _boxes(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Name -> shape, dtype, offset and shape of this rank's shard."""
    boxes = {}
    for name, tensor in tensors.items():
        shard = shard_of(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        boxes[name] = [list(shard.shape), dtype, list(shard.offset), list(shard.local.shape)]
    return boxes


def _writers(held: list[dict[str, list[Any]]], tensors: dict[str, dict[str, Any]]) -> dict[str, set[int]]:
    """The ranks that write each tensor: of those with the same box, the one with the least to write."""
    load = [0] * len(held)
    writers: dict[str, set[int]] = {}
    for name, entry in tensors.items():
        holders: dict[str, list[int]] = {}
        for rank, boxes in enumerate(held):
            if name in boxes and _elements(boxes[name][3]):
                holders.setdefault(str(boxes[name][2:]), []).append(rank)
        covered = 0
        for ranks in holders.values():
            size = _elements(held[ranks[0]][name][3])
            writer = min(ranks, key=lambda rank: load[rank])
            load[writer] += size
            covered += size
            writers.setdefault(name, set()).add(writer)
        if covered != _elements(entry["shape"]):
            whole = _elements(entry["shape"])
            raise CheckpointError(f"{name}: the ranks hold {covered} of {whole} elements")
    return writers


def _elements(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


class Staging:
    """Host memory that holds a rank's share as it was at one step; allocated once, pinned for GPUs."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, run: Run, share: Share) -> list[Item]:
        """Copy the share and describe it; returns when the copies are complete."""
        tensors = run_tensors(run)
        items = []
        for name in share.names:
            shard = shard_of(tensors[name])
            buffer = self._buffers.get(name)
            if buffer is None:
                pin = shard.local.device.type == "cuda"
                buffer = torch.empty(shard.local.shape, dtype=shard.local.dtype, device="cpu", pin_memory=pin)
                self._buffers[name] = buffer
            buffer.copy_(shard.local, non_blocking=True)
            items.append(_item(name, buffer, shard.offset))
        if run.world.device.type == "cuda":
            torch.cuda.synchronize(run.world.device)
        return items


def in_place(run: Run, share: Share) -> list[Item]:
    """The share without a copy, for a save that ends before the next step begins."""
    tensors = run_tensors(run)
    shards = {name: shard_of(tensors[name]) for name in share.names}
    return [_item(name, shard.local.contiguous().cpu(), shard.offset) for name, shard in shards.items()]


def _item(name: str, host: torch.Tensor, offset: tuple[int, ...]) -> Item:
    shape = tuple(host.shape)
    dtype = file_dtype(host.dtype)
    piece = Piece(name=name, file="", start=0, num_bytes=0, dtype=dtype, offset=offset, shape=shape)
    return Item(piece=piece, chunks=[raw_bytes(host)])


def get_rng() -> dict[str, str]:
    """This rank's random state."""
    rng = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return rng


def set_rng(states: list[dict[str, str]], run: Run) -> None:
    """Put this rank's random state back; for another number of ranks, seed, step and rank decide one."""
    if len(states) != run.world.size:
        torch.manual_seed(hash((run.config.run.seed, run.progress.step, run.world.rank)) % 2**63)
        return
    put_rng(states[run.world.rank])


def put_rng(rng: dict[str, str]) -> None:
    """Put this rank's random state back."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(rng["cpu"]), dtype=torch.uint8))
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(rng["cuda"]), dtype=torch.uint8))
