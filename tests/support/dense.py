"""Attention by its definition: a dense mask over the whole packed sequence, in one process."""

from itertools import pairwise
from types import SimpleNamespace

import torch


def visible(cu_seqlens, mask, num_heads):
    """[H, T, T] bool: which key each query sees, written straight from `Mask`'s docstring."""
    total = cu_seqlens[-1]
    document, position = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.long)
    for number, (start, stop) in enumerate(pairwise(cu_seqlens)):
        document[start:stop] = number
        position[start:stop] = torch.arange(stop - start)
    distance = position[:, None] - position
    seen = document[:, None] == document
    if mask.causal:
        seen &= distance >= 0
    if mask.min_distance:
        seen &= distance >= mask.min_distance
    if mask.window is not None:
        seen &= (distance.abs() < mask.window) | (position < mask.sinks)
    if mask.block_stride is not None:
        block, stride = mask.block_stride
        seen &= (position[:, None] // block - position // block) % stride == 0
    if mask.anchor and total:
        seen[:, 0] = True
    heads = seen.expand(num_heads, total, total).clone()
    if mask.group_shift is not None:
        for head in range(num_heads):
            group = (position + (mask.group_shift // 2 if head >= num_heads // 2 else 0)) // mask.group_shift
            heads[head] &= group[:, None] == group
    return heads


def attention(q, k, v, seen, scale):
    """q [T, H, D], k and v [T, K, D] -> out [T, H, D], lse [H, T], largest logit [H]."""
    shared = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(shared, 1)) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(shared, 1))
    largest = logits.amax((1, 2)) if q.shape[0] else logits.new_full(q.shape[1:2], -torch.inf)
    return out, lse, largest


def inputs(total, num_heads, num_kv_heads, head_dim, dtype, seed=0):
    """q, k, v and the gradient of out for the whole sequence, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def error(found, expected):
    """max|a-b| / max|b|; infinite where one is -inf and the other is not, and for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not torch.equal(found.isinf(), expected.isinf()):
        return float("inf")
    finite = ~expected.isinf()
    difference = (found[finite].double() - expected[finite].double()).abs()
    if not difference.numel():
        return 0.0
    scale = max(float(expected[finite].abs().max()), 1e-3)
    return float(difference.nan_to_num(nan=torch.inf).max()) / scale


def packed(lengths):
    """A stand-in layout of one process: documents of these lengths, in order."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return SimpleNamespace(cu_seqlens=ends.to(torch.int32), token_index=torch.arange(int(ends[-1])))


def positions(lengths):
    """position_ids [sum(lengths)], restarting per document."""
    return torch.cat([torch.arange(n) for n in lengths] or [torch.zeros(0, dtype=torch.int64)])


def attend(q, k, v, *, layout, mask):
    """The reference as a decoder calls it: [t, H, D], [t, K, D], [t, K, D] -> [t, H, D]."""
    seen = visible(layout.cu_seqlens.tolist(), mask, q.shape[1])
    return attention(q, k, v, seen, q.shape[-1] ** -0.5)[0]
