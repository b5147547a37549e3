"""Normalisation and the gated feed-forward.

Shapes: t = this rank's tokens, E = hidden_size, F = ffn_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Divide the last dim by its root mean square, then scale per channel.

    At least float32 inside, the input's dtype outside.

    Source: Root Mean Square Layer Normalization (Zhang and Sennrich 2019), eq. 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype.

    torch has one kernel for it on GPUs; its CPU backward is a chain of generic operators, two to
    four times slower than the formula below.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    normed: Tensor = _RMSNormOnCPU.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RMSNormOnCPU(torch.autograd.Function):
    """Saves the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # in the dtype of scale, at least float32
        product = normed * grad
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        # d/dx: (g - normed * mean(g * normed)) * scale with g = grad * weight
        mean = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = torch.mul(grad, weight, out=product).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class TokenEmbedding(nn.Embedding):
    """Rows of the vocabulary, for reading tokens and, where the head shares them, for scoring them."""

    def project(self, x: Tensor) -> Tensor:
        """Logits of every row: [t, E] -> [t, V]."""
        return F.linear(x, self.weight)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Source: GLU Variants Improve Transformer (Shazeer 2020), eq. 6.
    """

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[t, E] -> [t, F] -> [t, E]."""
        hidden: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return hidden
