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
from .parts import Parts


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

    Args:
        config: the whole model's shape.
        attend: attention, called in every layer.
        parts: what to hold; None: everything. A tied head holds the embedding's weight.
    """

    def __init__(self, config: ModelConfig, attend: Attend, parts: Parts | None = None) -> None:
        super().__init__()
        self.config = config
        self.parts = parts = parts or Parts.whole(config)
        rope = with_head_dim(config.rope, config.head_dim)
        self.frequencies: Frequencies | Remapped = Frequencies.of(rope)
        if parts.embed or (parts.head and config.tied_embeddings):
            self.embedding = TokenEmbedding(vocab_rows(config), config.hidden_size)
        self.layers = nn.ModuleDict({str(n): Block(config, attend) for n in parts.layers})
        if parts.head:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if parts.head and not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, vocab_rows(config), bias=False)

    def forward(
        self,
        stream: Tensor,
        position_ids: Tensor,
        rope_id: Tensor | None = None,
        *,
        layout: SequenceLayout,
        noise: TokenNoise | None = None,
        parts: Parts | None = None,
    ) -> Tensor:
        """Logits of the next token after each of this rank's tokens, or the stream on its way there.

        Args:
            stream: [t] int64 token ids in layout order; without the embedding the stream [t, E].
            position_ids: [t] int64, the tokens' true positions in their documents.
            rope_id: [t] int64 or None, the frequency set of each token.
            layout: which global tokens this rank holds; handed to `attend`.
            noise: dropout of these tokens in this step; None: none.
            parts: what to compute, of what this decoder holds; None: all of it.

        Returns:
            [t, V] in the parameters' dtype; without the head [t, E].
        """
        parts = parts or self.parts
        x = self.embedding(stream) if parts.embed else stream  # [t] -> [t, E]
        if parts.layers:
            table: Positions = self.frequencies.table(position_ids, rope_id, dtype=x.dtype, layout=layout)
        for number in parts.layers:
            turns = number not in self.config.rope.none_layers
            dropped = noise and noise.at(number)
            x = self.layers[str(number)](x, table if turns else NoPositions(), layout, dropped)
        return self._score(self.norm(x)) if parts.head else x

    def _score(self, x: Tensor) -> Tensor:
        logits: Tensor = self.embedding.project(x) if self.config.tied_embeddings else self.head(x)
        return logits
