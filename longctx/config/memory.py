"""Closed-form estimate of the memory that training needs on each rank, for choosing degrees.

It counts what grows with the model and the sequence and nothing else: no allocator
fragmentation, no communication buffers. `FILL` leaves room for those.
"""

from dataclasses import dataclass

from .schema import ModelConfig

FILL = 0.9
ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}
ASSUMED_VOCAB = 131072
BYTES_VOCAB = 320


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes per rank by term."""

    state: float
    """Sharded parameters, gradients and AdamW moments."""
    gathered: float
    """Whole parameters and gradients of the layers at work."""
    activations: float
    """Tensors that the backward pass needs, without recomputation."""
    logits: float
    """Logits and their gradient."""

    @property
    def total(self) -> float:
        """Sum of the terms."""
        return self.state + self.gathered + self.activations + self.logits


def layer_params(model: ModelConfig) -> int:
    """Parameters of one decoder layer."""
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    bias = heads + 2 * kv_heads if model.attention_bias else 0
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    return model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.ffn_size) + bias + norms


def total_params(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model."""
    tables = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return model.num_layers * layer_params(model) + tables + model.hidden_size


def vocab_estimate(model: ModelConfig, tokenizer: str) -> int:
    """Rows of the embedding, assumed before a tokenizer has been read."""
    if model.vocab_size != "auto":
        return model.vocab_size
    return BYTES_VOCAB if tokenizer == "bytes" else ASSUMED_VOCAB


def estimate(
    model: ModelConfig, *, vocab_size: int, rank_tokens: float, shards: int, dtype: str, tp: int = 1
) -> MemoryEstimate:
    """Memory of one rank in bytes.

    state       4 P / shards numbers: parameter, gradient and two AdamW moments, kept in
                float32 (float64 when training in float64).
    gathered    two layers and the embedding tables in compute type, whole, and as many gradients.
    activations per token and layer 4 E + 3 H D + 3 K D + 4 F elements: two norm inputs and
                outputs; q before and after RoPE and the attention output; k before and after
                RoPE and v; gate, up, silu(gate) and their product.
    logits      per token V elements in compute type and two copies in at least float32.

    With tp every term is divided by it (norms too, which stay whole but are negligible), but for
    2 E per token and layer: a rank holds 1 / tp of the tokens between the matrices, and gathers all
    of them as the input of attention and of the feed-forward.

    Args:
        model: shape of the model.
        vocab_size: rows of the embedding.
        rank_tokens: tokens of a microbatch on this data rank, microbatch_tokens / cp.
        shards: ranks that share one copy of the state, pp x dp_shard x cp.
        dtype: compute type.
        tp: ranks that split every matrix.
    """
    item = ITEMSIZE[dtype]
    full = max(item, ITEMSIZE["float32"])
    tables = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    # With more ranks than key heads each rank still computes one of them.
    heads = model.num_heads / tp + max(1.0, model.num_kv_heads / tp)
    elements = 2 * model.hidden_size * (1 + 1 / tp) + 3 * heads * model.head_dim + 4 * model.ffn_size / tp
    return MemoryEstimate(
        state=total_params(model, vocab_size) * 4 * full / (shards * tp),
        gathered=2 * item * (2 * layer_params(model) + tables) / tp,
        activations=rank_tokens * model.num_layers * elements * item,
        logits=rank_tokens * vocab_size * (item + 2 * full) / tp,
    )
