"""Matrices whose weight gradients are computed later than their input gradients.

Backward of such a matrix computes dx alone and leaves a closure behind, which holds x and dy and
adds dy^T x to the weight's gradient when it is called. Everything else (norms, attention) has no
weight gradient worth putting off and is differentiated at once. Recomputed blocks are recomputed
once: the closures hold what the recomputation made.

The parameters must be gathered from forward until the closure has run.

Source: Zero Bubble Pipeline Parallelism (Qi et al. 2023), sec. 2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..tensor.linear import SplitLinear

Weight = Callable[[], Tensor]
"""This rank's part of a parameter, as it is when called."""


class Deferred:
    """Where backward leaves the weights' gradients of one model."""

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] | None = None

    @property
    def collects(self) -> bool:
        """Whether a split backward is under way."""
        return self._open is not None

    @contextmanager
    def collecting(self) -> Iterator[list[Callable[[], None]]]:
        """Backward inside puts off the weights' gradients; calling the list's entries computes them."""
        self._open = []
        try:
            yield self._open
        finally:
            self._open = None

    def attach(self, blocks: Iterable[nn.Module]) -> None:
        """Put off the weight gradients of every matrix in these blocks."""
        for block in blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.forward = partial(_forward, module, self)  # type: ignore[method-assign]
                elif isinstance(module, SplitLinear):
                    module.product = self.product

    def product(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """X [..., in] times the transpose of a weight [out, in]."""
        y: Tensor = _Product.apply(x, weight().detach(), weight, self)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias

    def later(self, gradient: Callable[[], None]) -> None:
        """Leave a computation for later.

        Raises:
            RuntimeError: not inside `collecting`.
        """
        if self._open is None:
            raise RuntimeError("a backward of this model is split: call it inside Deferred.collecting()")
        self._open.append(gradient)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, weight: Weight, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x, value)
        ctx.weight, ctx.deferred = weight, deferred
        return F.linear(x, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, value = ctx.saved_tensors
        # The flush of a step has no rows and nothing later. An empty microbatch leaves a gradient of
        # zeros: FSDP leaves out parameters without one, and every rank must reduce the same.
        if x.numel() or ctx.deferred.collects:
            ctx.deferred.later(partial(_accumulate, x, dy, ctx.weight))
        return dy @ value, None, None, None


def _forward(module: nn.Linear, deferred: Deferred, x: Tensor) -> Tensor:
    return deferred.product(x, lambda: module.weight, module.bias)


def _accumulate(x: Tensor, dy: Tensor, weight: Weight) -> None:
    parameter = weight()
    if isinstance(parameter, DTensor):
        raise RuntimeError(
            "a parameter was resharded before its gradient was computed, which would be lost; "
            "set parallel.reshard_after_forward=auto for a schedule that splits backward"
        )
    gradient = dy.flatten(0, -2).t() @ x.flatten(0, -2)
    torch.autograd.backward(parameter, gradient)
