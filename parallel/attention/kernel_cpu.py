"""torch's CPU flash op as a kernel.

The op takes [1, H, rows, D] views, shares key heads among query heads by itself, and aligns its
causal mask top-left, so it is only asked for causal squares. A row that its additive mask hides
entirely gets lse 0, not -inf: tiles have no such row. It has no variable-length form; each tile
is one call.
"""

import torch

from .kernels import Kernel, heads_first, per_tile, unseen
from .tiles import Tile, TileBatch, row_blocks

Tensor = torch.Tensor

_BAND_ROWS = 256  # rows per masked call: the mask is [rows, window + rows]


def _mask(batch: TileBatch, tile: Tile, like: Tensor) -> Tensor | None:
    if tile.low is None and tile.high is None:
        return None
    key = (tile.rows, tile.columns, tile.low, tile.high, like.dtype, like.device)
    if key not in batch.cache:
        hidden = unseen(tile, like.device)
        assert hidden is not None
        mask = torch.zeros(hidden.shape, dtype=like.dtype)
        batch.cache[key] = mask.masked_fill_(hidden, -torch.inf)
    found: Tensor = batch.cache[key]
    return found


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float) -> tuple[Tensor, Tensor]:
    causal = batch.form == "causal"

    def one(tile: Tile) -> tuple[Tensor, Tensor]:
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

    if batch.form != "band":
        out, lse = per_tile(batch, one, (0, 1))
        return out, lse
    parts = [one(block) for tile in batch.tiles for block in row_blocks(tile, _BAND_ROWS)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def _cpu_backward(  # noqa: PLR0913 -- see Backward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, batch: TileBatch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal = batch.form == "causal"

    def one(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
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

    def blocked(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        dk, dv = (torch.zeros(tile.columns, *x.shape[1:], dtype=lse.dtype) for x in (k, v))
        for block in row_blocks(tile, _BAND_ROWS):
            dq, dk_block, dv_block = one(block)
            parts.append(dq)
            columns = slice(block.k - tile.k, block.k - tile.k + block.columns)
            dk[columns] += dk_block
            dv[columns] += dv_block
        return torch.cat(parts), dk, dv

    dq, dk, dv = per_tile(batch, blocked if batch.form == "band" else one, (0, 0, 0))
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
