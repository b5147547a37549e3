"""Keys and values that slices leave on a rank for the slices behind them.

One buffer per layer holds the keys of all slices of a microbatch, one the gradients. Forward writes a
slice's rows and attends to everything up to them; backward runs from the last slice to the first, so
when it reaches a slice, all gradients of that slice's keys have been added up.

Shapes: n rows of a slice on this ring rank, m rows of it and all slices before, M of all slices.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(slots=True)
class _Buffers:
    """Of one layer."""

    keys: Tensor
    """[2, M, K, D] keys and values."""
    gradients: Tensor | None = None
    """[2, M, K, D] in at least float32."""


Buffers = dict[Hashable, _Buffers]
"""Of one microbatch, by layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Of one slice; slices of a microbatch share the buffers.

    Cost: 2 M K D elements a layer, and as many gradients during backward.
    """

    first: int
    """Rows of earlier slices, m - n."""
    total: int
    """M."""
    buffers: Buffers
    """Shared by all slices."""

    def extend(self, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A slice's keys and values [n, K, D] behind those of earlier slices: [m, K, D], without a copy."""
        return _Extend.apply(k, v, self, layer)  # type: ignore[no-untyped-call, no-any-return]


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, kept: Kept, layer: Hashable) -> tuple[Tensor, Tensor]:
        ctx.kept, ctx.layer, ctx.rows = kept, layer, len(k)
        if layer not in kept.buffers:
            kept.buffers[layer] = _Buffers(k.new_empty(2, kept.total, *k.shape[1:]))
        # `.data`: earlier slices' backward has saved their rows of the buffer, which stay as they are.
        stop = kept.first + len(k)
        whole = kept.buffers[layer].keys
        for row, part in zip(whole.data, (k, v), strict=True):
            row[kept.first : stop] = part
        return whole[0].data[:stop], whole[1].data[:stop]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kept: Kept = ctx.kept
        buffers = kept.buffers[ctx.layer]
        if buffers.gradients is None:
            exact = torch.promote_types(dk.dtype, torch.float32)
            buffers.gradients = torch.zeros_like(buffers.keys, dtype=exact)
        own = []
        for total, part in zip(buffers.gradients, (dk, dv), strict=True):
            total[: len(part)] += part
            own.append(total[kept.first : kept.first + ctx.rows].to(part.dtype))
        if not kept.first:
            del kept.buffers[ctx.layer]
        return own[0], own[1], None, None
