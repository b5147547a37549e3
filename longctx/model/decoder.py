"""The decoder: tokens of many documents in, logits out, one flat row without a batch dimension.

Shapes: t = this rank's tokens (possibly none), E = hidden_size, V = vocab_size.
"""

from torch import Tensor, nn

from parallel.layout import SequenceLayout
from parallel.noise import TokenDropout, TokenNoise

from ..config.schema import ModelConfig
from ..rope.remap import Remapped
from ..rope.spec import with_head_dim
from ..rope.tables import Attend, Frequencies, NoPositions, Positions
from .attention import Attention
from .layers import FeedForward, RMSNorm, TokenEmbedding
from .params import vocab_rows


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, attend)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config.hidden_size, config.ffn_size)
        self.dropout = TokenDropout()

    def forward(
        self, x: Tensor, positions: Positions, layout: SequenceLayout, noise: TokenNoise | None = None
    ) -> Tensor:
        """[t, E] -> [t, E]; `noise` drops elements of what is added to the stream."""
        noise = noise or TokenNoise.none()
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, layout), noise, 0)
        stream: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)), noise, 1)
        return stream


class Decoder(nn.Module):
    """A Llama-style decoder (Llama, Mistral, Qwen2, Qwen3 dense, by its config).

    `layers` is keyed by the global layer number, so that a parameter has one name on every
    pipeline stage. Can be built under `torch.device("meta")`: it holds no buffers.
    """

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        rope = with_head_dim(config.rope, config.head_dim)
        self.frequencies: Frequencies | Remapped = Frequencies.of(rope)
        self.embedding = TokenEmbedding(vocab_rows(config), config.hidden_size)
        self.layers = nn.ModuleDict({str(n): Block(config, attend) for n in range(config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, vocab_rows(config), bias=False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rope_id: Tensor | None = None,
        *,
        layout: SequenceLayout,
        noise: TokenNoise | None = None,
    ) -> Tensor:
        """Logits of the next token after each of this rank's tokens.

        Args:
            input_ids: [t] int64, in layout order.
            position_ids: [t] int64, the tokens' true positions in their documents.
            rope_id: [t] int64 or None, the frequency set of each token.
            layout: which global tokens this rank holds; handed to `attend`.
            noise: dropout of these tokens in this step; None: none.

        Returns:
            [t, V] in the parameters' dtype.
        """
        x = self.embedding(input_ids)  # [t] -> [t, E]
        positions: Positions = self.frequencies.table(position_ids, rope_id, dtype=x.dtype, layout=layout)
        for number, block in self.layers.items():
            turns = int(number) not in self.config.rope.none_layers
            dropped = noise and noise.at(int(number))
            x = block(x, positions if turns else NoPositions(), layout, dropped)
        x = self.norm(x)
        logits: Tensor = self.embedding.project(x) if self.config.tied_embeddings else self.head(x)
        return logits
