"""Plain torch as a kernel: any device, dtype, head dim and band; the reference for the others.

Works on blocks of query rows, so memory is [K, H / K, block, columns] and not quadratic.
"""

import torch

from .kernels import Kernel, per_tile, unseen
from .tiles import Tile, TileBatch, row_blocks

Tensor = torch.Tensor

_ROWS = 256  # query rows per block


def _grouped(x: Tensor, first: int, rows: int, kv_heads: int) -> Tensor:
    """[n, H, D] -> [K, H / K, rows, D] at least float32."""
    part = x[first : first + rows].to(torch.promote_types(x.dtype, torch.float32))
    grouped: Tensor = part.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return grouped


def scores(q: Tensor, k: Tensor, block: Tile, scale: float) -> Tensor:
    """Scaled logits of a tile, [K, H / K, rows, columns] at least float32; -inf where unseen."""
    kv_heads = k.shape[1]
    keys = _grouped(k, block.k, block.columns, kv_heads)  # [K, 1, columns, D]
    logits = _grouped(q, block.q, block.rows, kv_heads) @ keys.transpose(-1, -2) * scale
    hidden = unseen(block, q.device)
    return logits if hidden is None else logits.masked_fill(hidden, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float) -> tuple[Tensor, Tensor]:
    def one(tile: Tile) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for block in row_blocks(tile, _ROWS):
            logits = scores(q, k, block, scale)
            lse = logits.logsumexp(-1, keepdim=True)
            out = (logits - lse).exp() @ _grouped(v, block.k, block.columns, k.shape[1])
            outs.append(out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype))
            lses.append(lse.squeeze(-1).flatten(0, 1))
        return torch.cat(outs), torch.cat(lses, 1)

    out, lse = per_tile(batch, one, (0, 1))
    return out, lse


def _backward(  # noqa: PLR0913 -- the arguments of the formula
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, batch: TileBatch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k.shape[1]

    def one(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        dqs = []
        dk, dv = (x.new_zeros(kv_heads, tile.columns, x.shape[-1], dtype=lse.dtype) for x in (k, v))
        for block in row_blocks(tile, _ROWS):
            columns = slice(block.k - tile.k, block.k - tile.k + block.columns)
            rows = slice(block.q, block.q + block.rows)
            p = (scores(q, k, block, scale) - lse[:, rows].unflatten(0, (kv_heads, -1)).unsqueeze(-1)).exp()
            grad, result = (_grouped(x, block.q, block.rows, kv_heads) for x in (dout, out))
            dp = grad @ _grouped(v, block.k, block.columns, kv_heads).transpose(-1, -2)
            ds = p * (dp - (grad * result).sum(-1, keepdim=True)) * scale
            dqs.append((ds @ _grouped(k, block.k, block.columns, kv_heads)).permute(2, 0, 1, 3).flatten(1, 2))
            dk[:, columns] += (ds.transpose(-1, -2) @ _grouped(q, block.q, block.rows, kv_heads)).sum(1)
            dv[:, columns] += (p.transpose(-1, -2) @ grad).sum(1)
        return torch.cat(dqs), dk.transpose(0, 1), dv.transpose(0, 1)

    dq, dk, dv = per_tile(batch, one, (0, 0, 0))
    return dq, dk, dv


TORCH = Kernel(
    name="torch",
    forward=_forward,
    backward=_backward,
    missing=lambda: None,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    max_head_dim=1 << 20,
)
