"""What benchmarks/attention.py counts instead of timing: causal work per rank, and bytes sent.

Work is the number of (query, visible key) pairs of a rank, from the tokens it holds alone. Beside
ours stands torch's per-document head-tail balancer, as torch ships it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from harness import Figure

from parallel.attention import traffic
from parallel.layout import SequenceLayout

HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "itemsize": 2}
"""A layer of Llama-3-8B in bfloat16; counting costs nothing, so it is counted at full size."""
TORCH_PACKS = {2: [4, 12], 4: [512, 1024, 2560], 8: [64, 64, 128, 768]}
"""Packs of the published comparison, by ranks."""


def count(long_tail: Callable[[int, int], list[int]], *, seed: int, quick: bool) -> dict[str, Figure]:
    """Balance and bytes at 4 and 8 ranks, and the packs on which torch's balancer was measured."""
    figures = {}
    for ranks, lengths in TORCH_PACKS.items():
        name = f"count_{ranks}ranks_docs{'_'.join(map(str, lengths))}_work"
        figures[name] = Figure(work_ratio(ours(lengths, ranks), lengths), "max/mean", "ours; goal <= 1.05")
        figures[f"{name}_torch"] = Figure(
            work_ratio(torchs(lengths, ranks), lengths), "max/mean", "torch's per-document head-tail balancer"
        )
    for ranks in (4, 8):
        for tokens in (4096,) if quick else (4096, 8192, 16384):
            for pack, lengths in (("one", [tokens]), ("tail", long_tail(tokens, seed))):
                name = f"count_{ranks}ranks_{tokens // 1024}k_{pack}"
                work = work_ratio(ours(lengths, ranks), lengths)
                figures[f"{name}_work"] = Figure(work, "max/mean", "ring; goal <= 1.05")
                figures |= {f"{name}_{key}_sent": f for key, f in sent(lengths, ranks)}
    whole = [2048] * 8
    figures["count_8ranks_whole_documents_ring_sent"] = Figure(
        _bytes(whole, ring=8, ulysses=1, strategy="ring"), "bytes", "8 documents of 2,048 on 8 ranks; goal 0"
    )
    return figures


def sent(lengths: list[int], ranks: int) -> Iterator[tuple[str, Figure]]:
    """MB sent by the rank that sends most, forward and backward, by strategy."""
    full = _even_ring_bytes(sum(lengths), ranks)
    for name, ring, ulysses in (
        ("ulysses", 1, ranks),
        ("ring", ranks, 1),
        ("allgather", ranks, 1),
        ("usp", ranks // 2, 2),
    ):
        found = _bytes(lengths, ring=ring, ulysses=ulysses, strategy=name)
        note = f"{found / full:.2f} of the bytes of a ring that passes every key on"
        yield name, Figure(found / 1e6, "MB", note)


def work_ratio(shares: Sequence[np.ndarray], lengths: Sequence[int]) -> float:
    """Largest over mean causal work of the ranks' tokens."""
    pairs = np.concatenate([np.arange(1, n + 1) for n in lengths])
    work = [pairs[share].sum() for share in shares]
    return float(max(work) / np.mean(work))


def ours(lengths: list[int], ranks: int) -> list[np.ndarray]:
    """Tokens of each ring rank."""
    layout = _layout(lengths, ranks, 1)
    return [layout.at(rank, 0).token_index.numpy() for rank in range(ranks)]


def torchs(lengths: list[int], ranks: int) -> list[np.ndarray]:
    """Tokens of each rank under torch's balancer; lengths must divide by twice the ranks."""
    from torch.distributed.tensor.experimental._context_parallel import _load_balancer

    balancer = _load_balancer._PerDocumentHeadTailLoadBalancer([lengths], ranks, "cpu")
    index = torch.as_tensor(balancer._generate_indices()).reshape(-1)
    return [share.numpy() for share in index.chunk(ranks)]


def _bytes(lengths: list[int], *, ring: int, ulysses: int, strategy: str) -> int:
    layout = _layout(lengths, ring, ulysses)
    views = [layout.at(r, u) for r in range(ring) for u in range(ulysses)]
    found = [traffic(view, strategy=strategy, wire_itemsize=2, **HEADS) for view in views]
    return max(t.forward_bytes + t.backward_bytes for t in found)


def _even_ring_bytes(tokens: int, ranks: int) -> float:
    """Bytes per rank of forward (R-1) n 2 k and backward (R-1) n 2 k + R n 2 k."""
    row = 2 * HEADS["num_kv_heads"] * HEADS["head_dim"] * HEADS["itemsize"]
    return tokens / ranks * row * (3 * ranks - 2)


def _layout(lengths: list[int], ring: int, ulysses: int) -> SequenceLayout:
    offsets = [0, *np.cumsum(lengths).tolist()]
    return SequenceLayout.build(offsets, ring=ring, ulysses=ulysses, ring_rank=0, ulysses_rank=0)
