"""The rotation itself.

Shapes: t = this rank's tokens, H = heads, D = head_dim, P = pairs that turn.

Half-split layout: coordinate i turns with coordinate i + P, as in Hugging Face's Llama and
GPT-NeoX; with partial rotary the dims beyond 2P stay. The arithmetic is in the table's dtype (at
least float32), the result in the input's.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tables import RopeTable


def rotate(x: Tensor, table: "RopeTable") -> Tensor:
    """Turn every head of every token by its position.

    Args:
        x: [t, H, D], any floating dtype.
        table: cosines and sines of the same t tokens.

    Returns:
        [t, H, D] in x's dtype.

    Source: RoFormer (Su et al. 2021), eq. 34, with the coordinates paired half-split.
    """
    rotary = 2 * table.cos.shape[-1]
    rotated: Tensor = _Rotation.apply(x[..., :rotary], table.cos, table.sin)  # type: ignore[no-untyped-call]
    return rotated if rotary == x.shape[-1] else torch.cat((rotated, x[..., rotary:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """Saves nothing but the table: the gradient of a rotation is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    halves: Tensor = x.unflatten(-1, (2, -1))  # [t, H, D] -> [t, H, 2, D/2]
    # A bfloat16 x is promoted to the table's float32 inside the kernels, not copied beforehand.
    out: Tensor = halves * cos.unsqueeze(-2)
    (first, second), (out_first, out_second) = halves.unbind(-2), out.unbind(-2)
    out_first.addcmul_(second, sin, value=-sign)
    out_second.addcmul_(first, sin, value=sign)
    return out.flatten(-2).to(x.dtype)
