"""FlashAttention 3 as a kernel.

Signatures: `_flash_attn_forward` and `_flash_attn_backward` of hopper/flash_attn_interface.py, which
installs as the module flash_attn_interface. Two generations are in use:

- in the source archive of flash-attn 2.8.3: `causal`, `window_size=(-1, -1)`, plain functions;
- in the repository since (commit 01afd16d): custom operators with `is_causal` in the backward
  function, `window_size_left` and `window_size_right` in both, and defaults for what is left out.

Up to `causal` both take the same arguments in the same order, so those are passed by position;
windows go under the names that the operator or function has. Forward returns
(out, softmax_lse [H, n] float32, ...); backward fills dq, dk and dv.
"""

import inspect
from typing import Any

import torch

from .kernels import Kernel
from .varlen import HALF, Launch, gpu_reason, library, varlen_backward, varlen_forward

Tensor = torch.Tensor

MODULE = "flash_attn_interface"


def _forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    pack, call = launch.packing, library(MODULE)._flash_attn_forward
    nothing = (None,) * 4  # k_new, v_new, qv, out
    out, lse, *_ = call(
        q,
        k,
        v,
        *nothing,
        pack.cu_q,
        pack.cu_k,
        None,  # cu_seqlens_k_new
        None,  # seqused_q
        None,  # seqused_k
        pack.max_q,
        pack.max_k,
        *(None,) * 9,  # page_table, kv_batch_idx, leftpad_k, three of rotary, three descales
        launch.scale,
        launch.causal,
        **_window(call, launch),
    )
    return out, lse


def _backward(  # noqa: PLR0913 -- see LaunchBackward
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    pack, call = launch.packing, library(MODULE)._flash_attn_backward
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    call(
        dout,
        q,
        k,
        v,
        out,
        lse,
        pack.cu_q,
        pack.cu_k,
        None,  # sequed_q
        None,  # sequed_k
        pack.max_q,
        pack.max_k,
        dq,
        dk,
        dv,
        launch.scale,
        launch.causal,
        deterministic=launch.deterministic,
        **_window(call, launch),
    )
    return dq, dk, dv


def _window(call: Any, launch: Launch) -> dict[str, Any]:
    left = -1 if launch.left is None else launch.left
    right = -1 if launch.right is None else launch.right
    if (left, right) == (-1, -1):
        return {}
    # A custom operator hides its signature; its schema has the separate names.
    if "window_size" in inspect.signature(call).parameters:
        return {"window_size": (left, right)}
    return {"window_size_left": left, "window_size_right": right}


FLASH_ATTN_3 = Kernel(
    name="flash_attn_3",
    forward=varlen_forward(_forward),
    backward=varlen_backward(_backward),
    missing=gpu_reason(MODULE, 9, 9),
    devices=frozenset({"cuda"}),
    dtypes=HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    varlen=True,
)
"""Hopper only."""
