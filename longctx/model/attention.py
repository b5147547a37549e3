"""The attention layer: projections and rotation around an `attend` that may span many ranks.

Shapes: t = this rank's tokens, E = hidden_size, H = num_heads, K = num_kv_heads, D = head_dim.
"""

from torch import Tensor, nn

from parallel.attention import Mask
from parallel.layout import SequenceLayout

from ..config.schema import ModelConfig
from ..rope.tables import Attend, Positions
from .layers import RMSNorm


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = dim
        self.attend = attend
        self.mask = Mask(window=config.sliding_window)
        self.wq = nn.Linear(hidden, config.num_heads * dim, bias=bias)
        self.wk = nn.Linear(hidden, config.num_kv_heads * dim, bias=bias)
        self.wv = nn.Linear(hidden, config.num_kv_heads * dim, bias=bias)
        self.wo = nn.Linear(config.num_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions, layout: SequenceLayout) -> Tensor:
        """[t, E] -> q [t, H, D], k and v [t, K, D] -> [t, E]."""
        # The head count comes from the projection's width, so a projection that holds only some of
        # the heads works unchanged.
        heads = (-1, self.head_dim)
        q = self.q_norm(self.wq(x).unflatten(-1, heads))
        k = self.k_norm(self.wk(x).unflatten(-1, heads))
        v = self.wv(x).unflatten(-1, heads)
        mixed = positions.attend(self.attend, q, k, v, layout=layout, mask=self.mask)
        projected: Tensor = self.wo(mixed.flatten(-2))
        return projected
