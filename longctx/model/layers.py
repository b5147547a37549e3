"""Normalisation and the gated feed-forward.

Shapes: t = this rank's tokens, E = hidden_size, F = ffn_size.
"""

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
