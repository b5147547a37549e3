"""Frequencies equal transformers' and published values; what does not fit is refused by name."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longctx.errors import ConfigError
from longctx.rope import RopeConfig, rope_parameters
from longctx.rope.frequencies import METHODS
from longctx.rope.spec import METHOD_KEYS, with_head_dim

LLAMA3 = {"factor": 8.0, "original_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    ("default", {}),
    ("linear", {"factor": 16.0}),
    ("llama3", LLAMA3),
    ("llama3", {**LLAMA3, "factor": 32.0}),
]


def theirs(kind, head_dim, keys):
    keys = {"original_max_position_embeddings" if k == "original_len" else k: v for k, v in keys.items()}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **keys},
    )
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    return compute(config)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("kind", "keys"), CASES)
def test_equals_transformers(kind, keys, head_dim, monkeypatch):
    ours, factor = rope_parameters(RopeConfig(type=kind, theta=5e5, head_dim=head_dim, **keys))
    assert ours.dtype == torch.float64 and ours.shape == (head_dim // 2,)
    single, their_factor = theirs(kind, head_dim, keys)
    assert factor == their_factor
    # Their float32 rounds: compare with the largest entry; and with their formula in float64, entry by entry.
    assert (single.double() - ours).abs().max() <= 1e-7 * ours.max()
    monkeypatch.setattr(torch, "float", torch.float64)
    double, _ = theirs(kind, head_dim, keys)
    assert double.dtype == torch.float64
    assert ((double - ours) / ours).abs().max() <= 1e-7


@pytest.mark.parametrize(
    ("kind", "keys", "entries", "total"),
    [
        ("default", {}, {1: 8.14617217e-01, 16: 3.76060307e-02, 63: 2.45514070e-06}, 5.394233954),
        (
            "linear",
            {"factor": 16.0},
            {1: 5.09135760e-02, 35: 4.77810609e-05, 63: 1.53446294e-07},
            0.337139622,
        ),
        ("llama3", LLAMA3, {24: 7.29266508e-03, 29: 2.16657063e-03, 31: 8.56751460e-04}, 5.386058263),
    ],
)
def test_conformance_values(kind, keys, entries, total):
    inv_freq, factor = rope_parameters(RopeConfig(type=kind, theta=5e5, head_dim=128, **keys))
    for index, value in entries.items():
        assert inv_freq[index].item() == pytest.approx(value, rel=1e-6)
    assert inv_freq.sum().item() == pytest.approx(total, rel=1e-7)
    assert factor == 1.0


@pytest.mark.parametrize(("kind", "keys"), [("linear", {}), ("llama3", {"original_len": 8192})])
def test_factor_one_is_the_default(kind, keys):
    extended, _ = rope_parameters(RopeConfig(type=kind, head_dim=64, factor=1.0, **keys))
    base, _ = rope_parameters(RopeConfig(head_dim=64))
    torch.testing.assert_close(extended, base, rtol=1e-15, atol=0.0)


def test_registry_and_keys_name_the_same_methods():
    assert METHODS.keys() == METHOD_KEYS.keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "liner"}, "did you mean 'linear'"),
        ({"type": "zzz"}, "Choose one of default, linear, llama3"),
        ({"factor": 8.0}, "rope.factor=8.0 does not belong to rope.type=default.*linear, llama3"),
        (
            {"type": "linear", "factor": 2.0, "original_len": 64},
            "rope.original_len=64 does not belong.*llama3",
        ),
        (
            {"type": "linear", "factor": 2.0, "high_freq_factor": 9.0},
            "rope.high_freq_factor=9.0 does not belong",
        ),
        ({"type": "llama3", "factor": 8.0}, "needs rope.original_len"),
        ({"type": "linear", "factor": 0.5}, "rope.factor=0.5"),
        ({"type": "llama3", "factor": 8.0, "original_len": 0}, "rope.original_len=0"),
        ({**LLAMA3, "type": "llama3", "low_freq_factor": 4.0}, "rope.low_freq_factor=4.0"),
        ({"theta": 1.0}, "rope.theta=1.0"),
        ({"head_dim": 7}, "rope.head_dim=7 must be even"),
        ({"head_dim": 0}, "rope.head_dim=0"),
    ],
)
def test_refusals_name_the_key(keys, message):
    with pytest.raises(ConfigError, match=message):
        rope_parameters(RopeConfig(**{"head_dim": 64, **keys}))


def test_head_dim_comes_from_the_model():
    assert with_head_dim(RopeConfig(), 64).head_dim == 64
    assert with_head_dim(RopeConfig(head_dim=64), 64).head_dim == 64
    with pytest.raises(ConfigError, match=r"rope\.head_dim=32 differs from model\.head_dim=64"):
        with_head_dim(RopeConfig(head_dim=32), 64)
