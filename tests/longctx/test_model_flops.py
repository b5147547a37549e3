"""Model FLOPs by the causal convention, and exact parameter counts of public models."""

import pytest

from longctx.config.schema import ModelConfig
from longctx.errors import ConfigError
from longctx.model.flops import causal_flops, visible_pairs
from longctx.model.params import num_parameters, parameter_shapes


def shape(layers, hidden, ffn, heads, kv_heads, vocab, **other):
    keys = {"head_dim": 128, "tied_embeddings": False, **other}
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
        **keys,
    )


LLAMA3_8B = shape(32, 4096, 14336, 32, 8, 128256)


def test_tied_and_untied_differ_by_the_head():
    untied = num_parameters(shape(2, 64, 96, 4, 2, 320, head_dim=16))
    tied = num_parameters(shape(2, 64, 96, 4, 2, 320, head_dim=16, tied_embeddings=True))
    assert untied.total - tied.total == 320 * 64
    assert tied.non_embedding == untied.non_embedding - 320 * 64


@pytest.mark.parametrize(
    ("seq_len", "gflop"), [(8192, 51.5), (131072, 148.0), (524288, 457.0), (1048576, 870.0)]
)
def test_llama3_8b_per_token(seq_len, gflop):
    """Published figures of the causal convention: 6 (L P_layer + V h) + 6 S d L per token."""
    assert causal_flops(LLAMA3_8B, [seq_len]) / seq_len / 1e9 == pytest.approx(gflop, rel=0.005)


def test_equals_counting_by_hand():
    config = shape(2, 8, 12, 2, 1, 10, head_dim=4, attention_bias=True, qk_norm=True)
    matrices = (
        2 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 12) + 10 * 8
    )  # weights a token meets; no bias, no norm
    pairs = sum(q + 1 for n in (5, 3, 1) for q in range(n))
    assert causal_flops(config, [5, 3, 1]) == 6 * matrices * 9 + 12 * pairs * (2 * 4) * 2


@pytest.mark.parametrize("window", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 20])
def test_window_limits_the_pairs(length, window):
    assert visible_pairs(length, window) == sum(min(q + 1, window) for q in range(length))


def test_documents_do_not_see_each_other():
    together, apart = causal_flops(LLAMA3_8B, [8192]), causal_flops(LLAMA3_8B, [4096, 4096])
    assert together - apart == 12 * 4096 * 4096 * 32 * 128 * 32
    assert causal_flops(LLAMA3_8B, []) == 0.0


def test_an_unresolved_vocabulary_is_refused():
    for use in (parameter_shapes, lambda config: causal_flops(config, [8])):
        with pytest.raises(ConfigError, match=r"model\.vocab_size=auto"):
            use(ModelConfig())
