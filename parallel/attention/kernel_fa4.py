"""FlashAttention 4 as a kernel.

Signatures: `_flash_attn_fwd` and `_flash_attn_bwd` of flash_attn/cute/interface.py, read in the wheel of
flash-attn-4 4.0.0b36. Forward returns (out, lse [H, n] float32, ...) if `return_lse`; backward
takes (q, k, v, out, dout, lse, ...) and returns (dq, dk, dv, ...). A window of None is unbounded.
Head dims up to 128 are what every architecture that it serves has in common.
"""

import torch

from .kernels import Kernel
from .varlen import HALF, Launch, gpu_reason, library, varlen_backward, varlen_forward

Tensor = torch.Tensor

MODULE = "flash_attn.cute.interface"


def _forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    pack = launch.packing
    out, lse, *_ = library(MODULE)._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=pack.cu_q,
        cu_seqlens_k=pack.cu_k,
        max_seqlen_q=pack.max_q,
        max_seqlen_k=pack.max_k,
        softmax_scale=launch.scale,
        causal=launch.causal,
        window_size_left=launch.left,
        window_size_right=launch.right,
        return_lse=True,
    )
    return out, lse


def _backward(  # noqa: PLR0913 -- see LaunchBackward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    pack = launch.packing
    dq, dk, dv, *_ = library(MODULE)._flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=launch.scale,
        causal=launch.causal,
        window_size_left=launch.left,
        window_size_right=launch.right,
        cu_seqlens_q=pack.cu_q,
        cu_seqlens_k=pack.cu_k,
        max_seqlen_q=pack.max_q,
        max_seqlen_k=pack.max_k,
        deterministic=launch.deterministic,
    )
    return dq, dk, dv


FLASH_ATTN_4 = Kernel(
    name="flash_attn_4",
    forward=varlen_forward(_forward),
    backward=varlen_backward(_backward),
    missing=gpu_reason(MODULE, 9),
    devices=frozenset({"cuda"}),
    dtypes=HALF,
    max_head_dim=128,
    head_dim_multiple=8,
    varlen=True,
)
"""Hopper, Blackwell and later."""
