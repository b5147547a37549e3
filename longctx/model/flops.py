"""Model FLOPs of a training step, by the causal convention. No torch here.

Only what the mathematics asks for: forward and backward, each query against the keys it may see,
no recomputation, no input embedding (a lookup). Norms, rotation and softmax are not counted.
"""

from collections.abc import Iterable
from math import prod

from ..config.schema import ModelConfig
from .params import block_shapes, vocab_rows

FORWARD_AND_BACKWARD = 3
"""Each matmul of the forward has two in the backward: for its input and for its other operand."""


def visible_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one document: query i sees i + 1 keys, at most `window` of them."""
    span = length if window is None else min(length, window)
    return span * (span + 1) // 2 + (length - span) * span


def causal_flops(config: ModelConfig, doc_lengths: Iterable[int]) -> float:
    """Model FLOPs of one forward and backward over some documents.

    Args:
        config: the model; `vocab_size` must be a number.
        doc_lengths: tokens of each document (piece); attention does not cross them.

    Returns:
        Floating-point operations, a multiply-add counted as two.

    Raises:
        ConfigError: `model.vocab_size` is still `auto`.
    """
    lengths = [int(length) for length in doc_lengths]
    matrices = sum(prod(shape) for shape in block_shapes(config).values() if len(shape) == 2)
    per_token = 2 * (config.num_layers * matrices + vocab_rows(config) * config.hidden_size)
    per_pair = config.num_layers * 2 * 2 * config.num_heads * config.head_dim  # scores, weighted values
    pairs = sum(visible_pairs(length, config.sliding_window) for length in lengths)
    return float(FORWARD_AND_BACKWARD * (per_token * sum(lengths) + per_pair * pairs))
