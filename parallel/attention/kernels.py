"""What a kernel is to this package: a record of functions and capabilities.

Shapes: n query rows, m key rows, H query heads, K key/value heads, D head dim. A kernel works on
`TileBatch`es: it returns the tiles' rows packed in tile order, and never sees a tile without rows
or without keys (torch's CPU flash op dies of SIGFPE there).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .tiles import Tile, TileBatch

Tensor = torch.Tensor


class Forward(Protocol):
    """q [n, H, D], k and v [m, K, D] -> out [rows, H, D], lse [H, rows]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend; lse is the natural logarithm of the summed exponentials, at least float32."""


class Backward(Protocol):
    """Gradients of the packed rows given out and lse merged over all keys, seen here or not."""

    def __call__(  # noqa: PLR0913 -- the arguments of the formula
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        batch: TileBatch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dout, out [n, H, D], lse [H, n] -> dq [rows, H, D], dk and dv [key rows, K, D], in tile order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One attention backend. Adapters normalise lse and alignment here, so that nobody else must.

    Causal tiles are squares, where top-left and bottom-right alignment agree; a "band" tile is a
    window, whose adapter knows how its library counts.
    """

    name: str
    """What `make_attention(kernel=...)` calls it."""
    forward: Forward
    """Attention over tiles."""
    backward: Backward
    """Its gradients, with an externally merged out and lse."""
    missing: Callable[[], str | None]
    """Why it cannot run on this machine ("flash_attn is not installed"), or None."""
    devices: frozenset[str]
    """Device types it runs on."""
    dtypes: frozenset[torch.dtype]
    """Dtypes of q, k and v."""
    max_head_dim: int
    """Largest head dim."""
    forms: frozenset[str] = frozenset({"full", "causal", "band"})
    """Tile forms it computes."""
    varlen: bool = False
    """Whether a batch of tiles is one launch."""
    head_dim_multiple: int = 1
    """What the head dim must be a multiple of."""
    gqa: bool = True
    """Whether it takes fewer key heads than query heads."""


def per_tile(
    batch: TileBatch, one: Callable[[Tile], tuple[Tensor, ...]], dims: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Call `one` on each tile and pack each of its results along the given dim."""
    results = [one(tile) for tile in batch.tiles]
    if len(results) == 1:
        return results[0]
    return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), dims, strict=True))


def heads_first(x: Tensor, first: int, rows: int) -> Tensor:
    """Rows of x as one batch: [n, H, D] -> [1, H, rows, D], a view."""
    return x[first : first + rows].transpose(0, 1).unsqueeze(0)


def unseen(tile: Tile, device: torch.device) -> Tensor | None:
    """[rows, columns] bool: pairs outside the tile's band; None if every pair is seen."""
    if tile.low is None and tile.high is None:
        return None
    distance = torch.arange(tile.rows, device=device)[:, None] - torch.arange(tile.columns, device=device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if tile.low is not None:
        hidden |= distance < tile.low
    if tile.high is not None:
        hidden |= distance > tile.high
    return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A batch of tiles as the arguments of a variable-length kernel."""

    cu_q: Tensor
    """[tiles + 1] int32: offsets of the tiles' packed query rows."""
    cu_k: Tensor
    """[tiles + 1] int32: offsets of the tiles' packed key rows."""
    max_q: int
    """Most query rows of a tile."""
    max_k: int
    """Most key rows of a tile."""


def packing(batch: TileBatch, device: torch.device) -> Packing:
    """Offsets of a batch on a device, computed once per batch."""
    key = ("packing", device)
    if key not in batch.cache:
        rows, columns = [t.rows for t in batch.tiles], [t.columns for t in batch.tiles]
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
            for n in (rows, columns)
        )
        batch.cache[key] = Packing(cu_q=cu_q, cu_k=cu_k, max_q=max(rows), max_k=max(columns))
    found: Packing = batch.cache[key]
    return found


def packed(x: Tensor, batch: TileBatch, *, keys: bool, dim: int = 0) -> Tensor:
    """The tiles' rows along `dim` in tile order: a view where they are consecutive, else a gather.

    Args:
        x: rows of the whole block along `dim`.
        batch: the tiles.
        keys: whether x holds key rows or query rows.
        dim: 0 for [n, heads, D], 1 for lse [H, n].
    """
    span = batch.k_span if keys else batch.q_span
    if span is not None:
        return x.narrow(dim, span[0], span[1] - span[0])
    key = ("rows", keys, x.device)
    if key not in batch.cache:
        ranges = [(t.k, t.columns) if keys else (t.q, t.rows) for t in batch.tiles]
        rows = torch.cat([torch.arange(first, first + length) for first, length in ranges])
        batch.cache[key] = rows.to(x.device)
    return x.index_select(dim, batch.cache[key])
