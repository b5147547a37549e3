"""Tokens divided over the tp ranks between blocks, whole inside them.

Shapes: t = this data rank's tokens, R = tp ranks, n = ceil(t / R) rows of one tp rank, E = width.

The last rank's rows beyond t are padding (fewer than R in all): every collective is even, so any
number of tokens works without a plan of shares. Padding rows reach no kept row, so their gradients
are zero.

Source: Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al. 2022), sec. 4.2.2.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import comm
from ..comm import Group


def gather_tokens(x: Tensor, group: Group, rows: int | None = None) -> Tensor:
    """Every tp rank's rows: [n, E] -> [t, E], or the padded [R n, E] where `rows` is None.

    Cost: one all-gather forward, one reduce-scatter backward, of (R - 1) n E elements a rank.
    """
    gathered: Tensor = _Gather.apply(x, group, group.size * len(x) if rows is None else rows)  # type: ignore[no-untyped-call]
    return gathered


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over tp ranks: [t, E] -> [n, E], padded with zeros at the end.

    Cost: one reduce-scatter forward, one all-gather backward, of (R - 1) n E elements a rank.
    """
    scattered: Tensor = _Scatter.apply(x, group)  # type: ignore[no-untyped-call]
    return scattered


class Exchange(nn.Module):
    """Communication as a module of its own, so that compilation can leave it out of a graph."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group


class GatherTokens(Exchange):
    """`gather_tokens` over a group."""

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """[n, E] -> [t, E] or [R n, E]."""
        return gather_tokens(x, self.group, rows)


class ScatterTokens(Exchange):
    """`scatter_tokens` over a group."""

    def forward(self, x: Tensor) -> Tensor:
        """[t, E] -> [n, E]."""
        return scatter_tokens(x, self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: int) -> Tensor:
        ctx.group = group
        return comm.all_gather(x, group)[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return comm.reduce_scatter(_padded(grad, ctx.group.size), ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return comm.reduce_scatter(_padded(x, group.size), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return comm.all_gather(grad, ctx.group)[: ctx.rows], None


def _padded(x: Tensor, size: int) -> Tensor:
    missing = -len(x) % size
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x
