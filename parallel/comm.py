"""Every collective of the package: one place for timeouts, uneven sizes, renamed torch calls and counting.

Sizes come from the caller's plan, never from the peer: a size mismatch on gloo aborts the process.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .counter import Counter as Counter
from .group import Group as Group
from .group import Pending as Pending
from .group import naming as naming

# torch 2.13 renamed both and warns about the old names; 2.11 has only those.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def warm_up(group: Group) -> None:
    """Connect a group before its first point-to-point messages; every rank of it calls, once.

    NCCL leaves it undefined what happens if only some ranks of a group take part in its first
    communication, and in a ring some ranks may have nothing to send.
    """
    if group.warmed:
        return
    group.warmed.append(True)
    if group.size > 1 and _device(group).type == "cuda":
        dist.all_reduce(torch.zeros(1, device=_device(group)), group=group.handle)


def exchange(
    sends: Sequence[tuple[int, torch.Tensor]],
    receives: Sequence[tuple[int, torch.Tensor]],
    group: Group,
    *,
    kind: str = "p2p",
    step: int | None = None,
) -> Pending:
    """Start sending contiguous tensors to, and receiving into buffers from, single peers of the group.

    Args:
        sends: (index in the group, tensor) pairs.
        receives: (index in the group, buffer) pairs.
        group: the ranks.
        kind: label for the counter.
        step: position in a longer operation, for the error message.

    Returns:
        The communication under way. Empty lists start nothing and count nothing.

    Raises:
        PeerLost: a connection is already closed.
    """
    pending = Pending(group, kind, step)
    if not sends and not receives:
        return pending
    group.counter.add(kind, sum(tensor.nbytes for _, tensor in sends))
    staged = _stages_through_host(group, (receives or sends)[0][1])
    sources = [(peer, tensor.cpu() if staged else tensor) for peer, tensor in sends]
    targets = [(peer, torch.empty_like(b, device="cpu") if staged else b) for peer, b in receives]
    pending._keep += [source for _, source in sources]
    if staged:
        pending._after += [(b, t) for (_, b), (_, t) in zip(receives, targets, strict=True)]
    # Receives are waited for first: gloo ends them when a peer is lost, a send perhaps at its timeout alone.
    peers = [peer for peer, _ in (*targets, *sources)]
    with naming(group, kind, step=step):
        works = _start(sources, targets, group)
    # NCCL coalesces a batch into one work, gloo returns one per operation.
    pending._works = (
        list(zip(peers, works, strict=True)) if len(works) == len(peers) else [(None, w) for w in works]
    )
    return pending


def _start(
    sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]], group: Group
) -> list[Any]:
    if _is_gloo(group, (receives or sends)[0][1]):
        # Called as torch does in the end: what it checks before takes longer than a small message.
        sent = [group.handle.send([source], peer, 0) for peer, source in sends]
        return [group.handle.recv([target], peer, 0) for peer, target in receives] + sent
    operations = [dist.P2POp(dist.irecv, t, group=group.handle, group_peer=peer) for peer, t in receives]
    operations += [dist.P2POp(dist.isend, t, group=group.handle, group_peer=peer) for peer, t in sends]
    works: list[Any] = dist.batch_isend_irecv(operations)
    return works


def all_to_all(
    send: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: Group, *, kind: str
) -> tuple[torch.Tensor, Pending]:
    """Start an uneven all-to-all of a flat buffer.

    Args:
        send: [sum(send_counts)] contiguous; the part for rank i follows the part for rank i-1.
        send_counts: elements for each rank.
        receive_counts: elements from each rank.
        group: the ranks.
        kind: label for the counter.

    Returns:
        received [sum(receive_counts)], valid once the second value has been waited for.

    Raises:
        PeerLost: a connection is already closed.
    """
    received = send.new_empty(sum(receive_counts))
    pending = Pending(group, kind, None)
    if group.size == 1:
        received.copy_(send)
        return received, pending
    group.counter.add(kind, (sum(send_counts) - send_counts[group.rank]) * send.element_size())
    with naming(group, kind):
        work = dist.all_to_all_single(
            received, send, list(receive_counts), list(send_counts), group=group.handle, async_op=True
        )
    pending._works.append((None, work))
    pending._keep.append(send)
    return received, pending


def all_reduce(tensor: torch.Tensor, group: Group, *, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` over the group, in place, and return it; `op` is sum, max or min."""
    if group.size == 1:
        return tensor
    group.counter.add("all_reduce", tensor.nbytes)
    with naming(group, "all_reduce"):
        dist.all_reduce(tensor, op=_REDUCE[op], group=group.handle)
    return tensor


def all_gather(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Concatenate equally many rows of every rank in rank order: [n, ...] -> [size n, ...]."""
    if group.size == 1:
        return tensor
    whole = tensor.new_empty(group.size * len(tensor), *tensor.shape[1:])
    return _collect("all_gather", _ALL_GATHER, whole, tensor, group=group)


def reduce_scatter(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group and keep this rank's equal part: [size n, ...] -> [n, ...]."""
    if group.size == 1:
        return tensor
    rows = len(tensor) // group.size
    if tensor.numel() and _is_gloo(group, tensor):
        # gloo's own one takes twice the time: it reduces everything on every rank.
        return reduce_scatter_rows(tensor, [rows] * group.size, group, kind="reduce_scatter")
    part = tensor.new_empty(rows, *tensor.shape[1:])
    return _collect("reduce_scatter", _REDUCE_SCATTER, part, tensor, group=group)


def _collect(
    kind: str, call: Any, target: torch.Tensor, source: torch.Tensor, *, group: Group
) -> torch.Tensor:
    # Either way each rank sends (size - 1) / size of the larger buffer.
    larger = max(target.nbytes, source.nbytes)
    if not larger:
        return target  # every rank has the same size, so all stay away together
    group.counter.add(kind, larger // group.size * (group.size - 1))
    with naming(group, kind):
        call(target, source.contiguous(), group=group.handle)
    return target


def broadcast(tensor: torch.Tensor, *, src: int, group: Group) -> torch.Tensor:
    """Overwrite `tensor` with that of the group's rank `src`, in place, and return it."""
    if group.size == 1:
        return tensor
    group.counter.add("broadcast", tensor.nbytes if group.rank == src else 0)
    with naming(group, "broadcast", peer=src):
        dist.broadcast(tensor, group_src=src, group=group.handle)
    return tensor


def gather_json(value: Any, *, group: Group) -> list[Any]:
    """Every rank's `value` in rank order, as JSON reads it back (a tuple comes back as a list)."""
    text = json.dumps(value).encode()
    device = _device(group)
    lengths = gather_rows(torch.tensor([len(text)], device=device), [1] * group.size, group).tolist()
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    data = bytes(gather_rows(mine, lengths, group).cpu().numpy())
    ends = list(itertools.accumulate(lengths))
    return [json.loads(data[end - size : end]) for size, end in zip(lengths, ends, strict=True)]


def broadcast_json(value: Any, *, src: int, group: Group) -> Any:
    """The value of the group's rank `src` on every rank, as JSON reads it back.

    Args:
        value: on `src` what JSON can write; ignored elsewhere.
        src: index in the group.
        group: the ranks.

    Cost: two broadcasts, of 8 bytes and of the text.
    """
    text = json.dumps(value).encode() if group.rank == src else b""
    size = broadcast(torch.tensor([len(text)], device=_device(group)), src=src, group=group)
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if group.rank == src:
        buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return json.loads(bytes(broadcast(buffer.to(_device(group)), src=src, group=group).cpu().numpy()))


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    all_reduce(torch.zeros(1, device=_device(group)), group)


def gather_rows(tensor: torch.Tensor, counts: Sequence[int], group: Group) -> torch.Tensor:
    """Concatenate every rank's rows in rank order.

    Args:
        tensor: [counts[rank], ...] this rank's rows.
        counts: rows of each rank, from the plan; they may differ or be zero.
        group: the ranks.

    Returns:
        [sum(counts), ...] on every rank.
    """
    if group.size == 1:
        return tensor
    row = math.prod(tensor.shape[1:])
    flat = tensor.contiguous().view(-1)
    received, pending = all_to_all(
        flat.repeat(group.size),
        [flat.numel()] * group.size,
        [n * row for n in counts],
        group,
        kind="gather_rows",
    )
    pending.wait()
    return received.view(sum(counts), *tensor.shape[1:])


def reduce_scatter_rows(
    tensor: torch.Tensor, counts: Sequence[int], group: Group, *, kind: str = "reduce_scatter_rows"
) -> torch.Tensor:
    """Sum every rank's tensor and keep this rank's rows; ranks are added in rank order, so the sum is fixed.

    Args:
        tensor: [sum(counts), ...] the same shape on every rank.
        counts: rows that each rank keeps.
        group: the ranks.
        kind: label for the counter.

    Returns:
        [counts[rank], ...] this rank's rows of the sum.
    """
    if group.size == 1:
        return tensor
    row = math.prod(tensor.shape[1:])
    mine = counts[group.rank]
    received, pending = all_to_all(
        tensor.contiguous().view(-1),
        [n * row for n in counts],
        [mine * row] * group.size,
        group,
        kind=kind,
    )
    pending.wait()
    parts = received.view(group.size, mine, *tensor.shape[1:])
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _stages_through_host(group: Group, tensor: torch.Tensor) -> bool:
    # gloo's point-to-point calls hand the raw pointer to a socket: device memory must be copied first.
    return tensor.is_cuda and _is_gloo(group, tensor)


def _is_gloo(group: Group, tensor: torch.Tensor) -> bool:
    name: str = group.handle._get_backend(tensor.device).name()
    return name == "gloo"


def _device(group: Group) -> torch.device:
    if group.size == 1 or torch.device("cpu") in group.handle._device_types:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
