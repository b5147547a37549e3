"""Attention as a dense mask over whole documents: the reference that models are tested with."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F


def packed(lengths):
    """A stand-in layout of one process: documents of these lengths, in order."""
    return SimpleNamespace(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


def positions(lengths):
    """position_ids [sum(lengths)], restarting per document."""
    return torch.cat([torch.arange(n) for n in lengths] or [torch.zeros(0, dtype=torch.int64)])


def attend(q, k, v, *, layout, mask):
    """[t, H, D], [t, K, D], [t, K, D] -> [t, H, D]: causal inside each document, with the mask's window."""
    owner = torch.bucketize(torch.arange(len(q)), layout.cu_seqlens[1:], right=True)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    allowed = (owner[:, None] == owner) & (distance >= 0)
    if mask.window is not None:
        allowed &= distance < mask.window
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=allowed, enable_gqa=True)
    return out[0].transpose(0, 1)
