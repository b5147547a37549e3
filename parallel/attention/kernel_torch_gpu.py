"""torch's own CUDA attention operators as kernels: variable-length flash, and cuDNN.

`aten._flash_attention_forward` and `_backward` are what torch.nn.attention.varlen calls; using them
directly gives the backward pass an lse merged over hops. Schemas: torch 2.13.0 (those of 2.11 have
every argument that is passed here). They share key heads and align bottom-right.

cuDNN: torch 2.13 has a variable-length path, but switches it off in torch.nn.attention.varlen
(`_should_use_cudnn` returns False), so each tile is one call of the dense operators behind
scaled_dot_product_attention. They take [1, H, rows, D] with as many key as query heads, have no
window, align causal masks top-left, and return lse as [1, H, rows] or [1, H, rows, 1], depending on
torch's version; the backward operator gets it in the form that the forward operator returned.
"""

import torch

from .kernels import Kernel, heads_first, per_tile
from .tiles import Tile, TileBatch
from .varlen import HALF, Launch, gpu_reason, varlen_backward, varlen_forward

Tensor = torch.Tensor

_STATS = "cudnn_stats"  # key in TileBatch.cache: trailing dims of cuDNN's lse


def _forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    pack = launch.packing
    out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        pack.cu_q,
        pack.cu_k,
        pack.max_q,
        pack.max_k,
        0.0,
        launch.causal,
        False,
        scale=launch.scale,
        window_size_left=-1 if launch.left is None else launch.left,
        window_size_right=-1 if launch.right is None else launch.right,
    )
    return out, lse


def _backward(  # noqa: PLR0913 -- see LaunchBackward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    pack = launch.packing
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        pack.cu_q,
        pack.cu_k,
        pack.max_q,
        pack.max_k,
        0.0,
        launch.causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state: there is no dropout
        torch.empty(0, device=q.device),
        scale=launch.scale,
        window_size_left=-1 if launch.left is None else launch.left,
        window_size_right=-1 if launch.right is None else launch.right,
    )
    return dq, dk, dv


TORCH_FLASH = Kernel(
    name="torch_flash",
    forward=varlen_forward(_forward),
    backward=varlen_backward(_backward),
    missing=gpu_reason(None, 8),
    devices=frozenset({"cuda"}),
    dtypes=HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    varlen=True,
)
"""Ampere and later, nothing to install."""


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, *, batch: TileBatch, scale: float
) -> tuple[Tensor, Tensor]:
    def one(tile: Tile) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            heads_first(q, tile.q, tile.rows),
            heads_first(k, tile.k, tile.columns),
            heads_first(v, tile.k, tile.columns),
            None,
            True,
            0.0,
            batch.form == "causal",
            False,
            scale=scale,
        )
        batch.cache[_STATS] = lse.shape[3:]
        return out[0].transpose(0, 1), lse.reshape(q.shape[1], tile.rows)

    out, lse = per_tile(batch, one, (0, 1))
    return out, lse


def _cudnn_backward(  # noqa: PLR0913 -- see Backward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, batch: TileBatch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # there is no dropout

    def one(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        sums = lse[:, tile.q : tile.q + tile.rows].contiguous()
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            heads_first(dout, tile.q, tile.rows),
            heads_first(q, tile.q, tile.rows),
            heads_first(k, tile.k, tile.columns),
            heads_first(v, tile.k, tile.columns),
            heads_first(out, tile.q, tile.rows),
            sums.view(1, q.shape[1], tile.rows, *batch.cache[_STATS]),
            seed,
            seed,
            None,
            None,
            None,
            tile.rows,
            tile.columns,
            0.0,
            batch.form == "causal",
            scale=scale,
        )
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return dq, dk, dv

    dq, dk, dv = per_tile(batch, one, (0, 0, 0))
    return dq, dk, dv


CUDNN = Kernel(
    name="cudnn",
    forward=_cudnn_forward,
    backward=_cudnn_backward,
    missing=gpu_reason(None, 8),
    devices=frozenset({"cuda"}),
    dtypes=HALF,
    max_head_dim=128,
    head_dim_multiple=8,
    forms=frozenset({"full", "causal"}),
    gqa=False,
)
"""Ampere and later, nothing to install; equal head counts only."""
