"""Every parameter of a decoder by name and shape, from its config alone. No torch here.

Shapes: E = hidden_size, F = ffn_size, H = num_heads, K = num_kv_heads, D = head_dim, V = vocab_size.
"""

import math
from typing import NamedTuple

from ..config.schema import ModelConfig
from ..errors import ConfigError

EMBEDDING = "embedding.weight"
HEAD = "head.weight"
NORM = "norm.weight"


class ParameterCount(NamedTuple):
    """How many numbers a model learns."""

    total: int
    """All parameters; a tied embedding counts once."""
    non_embedding: int
    """Without the input embedding; an untied head is included."""


def vocab_rows(config: ModelConfig) -> int:
    """V as a number.

    Raises:
        ConfigError: `model.vocab_size` is still `auto`.
    """
    if not isinstance(config.vocab_size, int):
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} has not been replaced by the tokenizer's size; "
            "set model.vocab_size to a number of tokens, or resolve the config with its tokenizer first"
        )
    return config.vocab_size


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names inside one layer -> shapes, matrices as [out, in]."""
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    widths = {"wq": queries, "wk": keys, "wv": keys}
    shapes: dict[str, tuple[int, ...]] = {"attention_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    for name, width in widths.items():
        shapes[f"attention.{name}.weight"] = (width, hidden)
        if config.attention_bias:
            shapes[f"attention.{name}.bias"] = (width,)
    shapes["attention.wo.weight"] = (hidden, queries)
    if config.qk_norm:
        shapes |= {"attention.q_norm.weight": (dim,), "attention.k_norm.weight": (dim,)}
    shapes |= {"ffn.gate.weight": (ffn, hidden), "ffn.up.weight": (ffn, hidden)}
    return shapes | {"ffn.down.weight": (hidden, ffn)}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global parameter names -> global shapes, as `Decoder(config, ...).named_parameters()` has them."""
    vocab = vocab_rows(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, config.hidden_size)}
    block = block_shapes(config)
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes[NORM] = (config.hidden_size,)
    if not config.tied_embeddings:
        shapes[HEAD] = (vocab, config.hidden_size)
    return shapes


def num_parameters(config: ModelConfig) -> ParameterCount:
    """Exact parameter counts of the whole model."""
    shapes = parameter_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    return ParameterCount(total=total, non_embedding=total - math.prod(shapes[EMBEDDING]))
