"""torch's CPU flash op as a kernel.

The op takes [1, H, rows, D] views, shares key heads among query heads by itself, and aligns its
causal mask top-left, so it is only asked for causal squares. A row that its additive mask hides
entirely gets lse 0, not -inf: tiles have no such row. It has no variable-length form; each tile
is one call.

Its causal form computes every block of 512 keys whole, so a square of up to 512 rows costs as much
as one without a mask. Short squares are therefore cut: forward into rows that end at their last
visible key, backward into columns of keys, each a small causal square above a full rectangle.
"""

import torch

from .kernels import Kernel, heads_first, per_tile, unseen
from .tiles import Tile, TileBatch, row_blocks

Tensor = torch.Tensor

_BAND_ROWS = 256  # rows per masked call of a band: the mask is [rows, window + rows]
_CAUSAL_ROWS = 128  # rows, or columns, per call of a short causal square
_ROWS_UP_TO = 1024  # rows of a causal square from which cutting it costs more than hidden keys: forward,
_COLUMNS_UP_TO = 2048  # and backward


def _row_calls(batch: TileBatch, tile: Tile) -> list[Tile]:
    """The tile as rows that single calls compute."""
    if batch.form == "band":
        return row_blocks(tile, _BAND_ROWS)
    if batch.form == "causal" and tile.rows <= _ROWS_UP_TO:
        return row_blocks(tile, _CAUSAL_ROWS)
    return [tile]


def _column_calls(batch: TileBatch, tile: Tile) -> list[Tile]:
    """The tile as squares and rectangles that single calls compute without a mask of their own."""
    if batch.form == "band":
        return row_blocks(tile, _BAND_ROWS)
    if batch.form != "causal" or tile.rows > _COLUMNS_UP_TO:
        return [tile]
    calls = []
    for first in range(0, tile.rows, _CAUSAL_ROWS):
        size, below = min(_CAUSAL_ROWS, tile.rows - first), max(tile.rows - first - _CAUSAL_ROWS, 0)
        calls.append(Tile(tile.q + first, size, tile.k + first, size, 0))
        if below:
            calls.append(Tile(tile.q + first + size, below, tile.k + first, size))
    return calls


def _mask(batch: TileBatch, tile: Tile, like: Tensor) -> Tensor | None:
    if tile.low is None and tile.high is None:
        return None
    if batch.form == "causal":
        return _lower_triangle(batch, tile, like)
    key = (tile.rows, tile.columns, tile.low, tile.high, like.dtype, like.device)
    if key not in batch.cache:
        batch.cache[key] = _additive(tile, like)
    found: Tensor = batch.cache[key]
    return found


def _lower_triangle(batch: TileBatch, block: Tile, like: Tensor) -> Tensor:
    """The mask of a causal square's rows: a window of one mask that serves squares of every size."""
    if like.dtype not in batch.cache:
        widest = Tile(0, _CAUSAL_ROWS, 0, _ROWS_UP_TO + _CAUSAL_ROWS, -_ROWS_UP_TO)
        batch.cache[like.dtype] = _additive(widest, like)
    assert block.low is not None
    first = _ROWS_UP_TO + block.low
    found: Tensor = batch.cache[like.dtype]
    return found[: block.rows, first : first + block.columns]


def _additive(tile: Tile, like: Tensor) -> Tensor:
    hidden = unseen(tile, like.device)
    assert hidden is not None
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float) -> tuple[Tensor, Tensor]:
    def one(tile: Tile, *, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(q, tile.q, tile.rows),
            heads_first(k, tile.k, tile.columns),
            heads_first(v, tile.k, tile.columns),
            0.0,
            causal,
            attn_mask=None if causal else _mask(batch, tile, q),
            scale=scale,
        )
        return out[0].transpose(0, 1), lse[0]

    def whole(tile: Tile) -> tuple[Tensor, Tensor]:
        calls = _row_calls(batch, tile)
        if calls == [tile]:
            return one(tile, causal=batch.form == "causal")
        parts = [one(block, causal=False) for block in calls]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    out, lse = per_tile(batch, whole, (0, 1))
    return out, lse


def _cpu_backward(  # noqa: PLR0913 -- see Backward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, batch: TileBatch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    def one(tile: Tile, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            heads_first(dout, tile.q, tile.rows),
            heads_first(q, tile.q, tile.rows),
            heads_first(k, tile.k, tile.columns),
            heads_first(v, tile.k, tile.columns),
            heads_first(out, tile.q, tile.rows),
            lse[:, tile.q : tile.q + tile.rows].unsqueeze(0),
            0.0,
            causal,
            attn_mask=None if causal else _mask(batch, tile, q),
            scale=scale,
        )
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return dq, dk, dv

    def whole(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        calls = _column_calls(batch, tile)
        if calls == [tile]:
            return one(tile, causal=batch.form == "causal")
        dq = torch.zeros(tile.rows, *q.shape[1:], dtype=lse.dtype)
        dk, dv = (torch.zeros(tile.columns, *x.shape[1:], dtype=lse.dtype) for x in (k, v))
        for call in calls:
            grads = one(call, causal=batch.form == "causal" and call.low is not None)
            rows, columns = call.q - tile.q, call.k - tile.k
            dq[rows : rows + call.rows] += grads[0]
            dk[columns : columns + call.columns] += grads[1]
            dv[columns : columns + call.columns] += grads[2]
        return dq, dk, dv

    dq, dk, dv = per_tile(batch, whole, (0, 0, 0))
    return dq, dk, dv


CPU_FLASH = Kernel(
    name="cpu_flash",
    forward=_cpu_forward,
    backward=_cpu_backward,
    missing=lambda: None,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    max_head_dim=1024,
)
