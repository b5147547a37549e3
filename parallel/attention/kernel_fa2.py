"""flash-attn 2 as a kernel.

Signatures: `_wrapped_flash_attn_varlen_forward` and `_wrapped_flash_attn_varlen_backward` of
flash_attn/flash_attn_interface.py, read in the source archives of flash-attn 2.7.4.post1 and 2.8.3
(equal in both). The forward function returns (out, softmax_lse [H, n] float32, S_dmask, rng_state);
the backward function fills dq, dk and dv. Causal masks are aligned bottom-right, a window of -1
is unbounded, and head dims must be multiples of 8 here (the public functions pad).
"""

import torch

from .kernels import Kernel
from .varlen import HALF, Launch, gpu_reason, library, varlen_backward, varlen_forward

Tensor = torch.Tensor

MODULE = "flash_attn.flash_attn_interface"


def _forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    pack = launch.packing
    out, lse, _, _ = library(MODULE)._wrapped_flash_attn_varlen_forward(
        q,
        k,
        v,
        pack.cu_q,
        pack.cu_k,
        pack.max_q,
        pack.max_k,
        0.0,
        launch.scale,
        causal=launch.causal,
        window_size_left=-1 if launch.left is None else launch.left,
        window_size_right=-1 if launch.right is None else launch.right,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, lse


def _backward(  # noqa: PLR0913 -- see LaunchBackward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    pack = launch.packing
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    library(MODULE)._wrapped_flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        pack.cu_q,
        pack.cu_k,
        pack.max_q,
        pack.max_k,
        0.0,
        launch.scale,
        launch.causal,
        -1 if launch.left is None else launch.left,
        -1 if launch.right is None else launch.right,
        0.0,
        None,
        launch.deterministic,
        rng_state=None,
    )
    return dq, dk, dv


FLASH_ATTN_2 = Kernel(
    name="flash_attn_2",
    forward=varlen_forward(_forward),
    backward=varlen_backward(_backward),
    missing=gpu_reason(MODULE, 8),
    devices=frozenset({"cuda"}),
    dtypes=HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    varlen=True,
)
"""Ampere and later."""
