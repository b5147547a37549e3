"""Attention over blocks of keys that arrive one after another: one autograd.Function for all routes.

A route says in which steps key blocks arrive and where their gradients go; this file computes.

Shapes: n rows of this rank, H and K its query and key/value heads, D head dim.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from .kernel_torch import scores
from .kernels import Kernel
from .merge import merge_
from .plan import Step
from .tiles import TileBatch, row_blocks

Tensor = torch.Tensor

_LOGIT_ROWS = 256  # query rows whose logits are in memory at a time, when the largest is wanted


class Gradients(Protocol):
    """Where a backward pass puts key and value gradients, block by block."""

    def put(self, dk: Tensor, dv: Tensor) -> None:
        """Take the gradients of the step's block, [num_keys, K, D] each."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's own keys and values from all ranks, [n, K, D] each."""


class Route(Protocol):
    """How keys reach the queries."""

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Steps with their key and value blocks, [num_keys, K, D]; the first holds the rank's own."""

    def gradients(self, k: Tensor) -> Gradients:
        """Start collecting gradients; `put` is then called once per step, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one attention call computes with."""

    route: Route
    """Steps and transfers."""
    kernels: Mapping[str, Kernel]
    """The backend for each form of tiles."""
    scale: float
    """Factor on the logits."""
    max_logit: bool = False
    """Whether the largest logit per head is wanted."""


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of this rank's queries to every key the route brings.

    Args:
        q: [n, H, D].
        k: [n, K, D], K dividing H, or blocks of heads in the route's plan.
        v: [n, K, D].
        call: route, kernel, scale.

    Returns:
        out [n, H, D] in q.dtype; lse [H, n] at least float32 without gradient; the largest logit
        per head [H] (-inf where there is none) if asked for, not yet reduced over ranks.
    """
    out, lse, largest = _Attend.apply(q, k, v, call)  # type: ignore[no-untyped-call]
    return out, lse, largest


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        state = _Forward(q)
        largest = _minus_inf(q.shape[1], like=q) if call.max_logit else None
        for step, keys, values in call.route.blocks(k, v):
            for batch in step.batches:
                heads = _HeadViews(batch)
                part = call.kernels[batch.form].forward(
                    heads.q(q), heads.kv(keys), heads.kv(values), batch=batch, scale=call.scale
                )
                state.add(batch, *part)
                if largest is not None:
                    _raise_largest(largest, heads.q(q), heads.kv(keys), batch, call.scale)
        out, lse = state.finish()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, *([] if largest is None else [largest]))
        return out, lse, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        dout = torch.zeros_like(out) if dout is None else dout
        dq = _Sum(q)
        sink = call.route.gradients(k)
        for step, keys, values in call.route.blocks(k, v):
            dk, dv = _Sum(keys), _Sum(values)
            for batch in step.batches:
                heads = _HeadViews(batch)
                grads = call.kernels[batch.form].backward(
                    heads.q(dout),
                    heads.q(q),
                    heads.kv(keys),
                    heads.kv(values),
                    heads.q(out),
                    heads.lse(lse),
                    batch=batch,
                    scale=call.scale,
                )
                dq.add(grads[0], batch, keys=False)
                dk.add(grads[1], batch, keys=True)
                dv.add(grads[2], batch, keys=True)
            sink.put(dk.total(), dv.total())
        dk_own, dv_own = sink.finish()
        return dq.total().to(q.dtype), dk_own.to(k.dtype), dv_own.to(v.dtype), None


class _HeadViews:
    """Views of the heads that a batch is for."""

    __slots__ = ("_kv", "_q")

    def __init__(self, batch: TileBatch) -> None:
        self._q = None if batch.heads is None else slice(*batch.heads.q)
        self._kv = None if batch.heads is None else slice(*batch.heads.kv)

    def q(self, x: Tensor) -> Tensor:
        return x if self._q is None else x[:, self._q]

    def kv(self, x: Tensor) -> Tensor:
        return x if self._kv is None else x[:, self._kv]

    def lse(self, x: Tensor) -> Tensor:
        return x if self._q is None else x[self._q]


class _Forward:
    """out and lse over the tiles seen so far; a single tile batch that covers all is kept as it is."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, batch: TileBatch, part: Tensor, part_lse: Tensor) -> None:
        rows, heads = self._q.shape[0], self._q.shape[1]
        if self._out is None and batch.heads is None and batch.q_span == (0, rows):
            self._out, self._lse = part, part_lse
            return
        exact = torch.promote_types(self._q.dtype, torch.float32)
        if self._out is None or self._lse is None:
            self._out = torch.zeros(self._q.shape, dtype=exact, device=self._q.device)
            self._lse = _minus_inf(heads, rows, like=self._q)
        self._out = self._out.to(exact)
        views = _HeadViews(batch)
        out, lse = views.q(self._out), views.lse(self._lse)
        for (start, stop), (first, last) in _spans(batch, keys=False):
            merge_(out[start:stop], lse[:, start:stop], part[first:last], part_lse[:, first:last])

    def finish(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            return torch.zeros_like(self._q), _minus_inf(*self._q.shape[1::-1], like=self._q)
        return self._out.to(self._q.dtype), self._lse


class _Sum:
    """A gradient summed over tiles in at least float32; a single covering batch is kept as it is."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._total: Tensor | None = None

    def add(self, part: Tensor, batch: TileBatch, *, keys: bool) -> None:
        span = batch.k_span if keys else batch.q_span
        if self._total is None and batch.heads is None and span == (0, self._like.shape[0]):
            self._total = part
            return
        exact = torch.promote_types(self._like.dtype, torch.float32)
        if self._total is None:
            self._total = torch.zeros(self._like.shape, dtype=exact, device=self._like.device)
        self._total = self._total.to(exact)
        views = _HeadViews(batch)
        total = views.kv(self._total) if keys else views.q(self._total)
        for (start, stop), (first, last) in _spans(batch, keys=keys):
            total[start:stop] += part[first:last]

    def total(self) -> Tensor:
        return torch.zeros_like(self._like) if self._total is None else self._total


def _spans(batch: TileBatch, *, keys: bool) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the packed rows of a batch belong: pairs of (rows in the whole, rows in the pack)."""
    span = batch.k_span if keys else batch.q_span
    if span is not None:
        return [(span, (0, span[1] - span[0]))]
    pairs, first = [], 0
    for tile in batch.tiles:
        start, length = (tile.k, tile.columns) if keys else (tile.q, tile.rows)
        pairs.append(((start, start + length), (first, first + length)))
        first += length
    return pairs


def _minus_inf(*shape: int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full(shape, -torch.inf, dtype=dtype, device=like.device)


def _raise_largest(largest: Tensor, q: Tensor, k: Tensor, batch: TileBatch, scale: float) -> None:
    """Raise `largest` to the largest logits of a batch; kernels do not return them."""
    heads = slice(None) if batch.heads is None else slice(*batch.heads.q)
    for tile in batch.tiles:
        for block in row_blocks(tile, _LOGIT_ROWS):
            found = scores(q, k, block, scale).amax((-2, -1)).flatten()
            largest[heads] = torch.maximum(largest[heads], found)
