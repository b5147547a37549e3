"""Frequencies equal transformers' and published values; what does not fit is refused by name."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longctx.errors import ConfigError
from longctx.rope import RopeConfig, rope_parameters
from longctx.rope.frequencies import METHODS, abf_theta
from longctx.rope.scaling_law import base_for_length, critical_dim, longest_context
from longctx.rope.spec import METHOD_KEYS, with_head_dim

HALF = 32
LLAMA3 = {"factor": 8.0, "original_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 16.0, "original_len": 8192}
LONGROPE = {"factor": 16.0, "original_len": 8192}
CASES = [
    ("default", {}, None),
    ("linear", {"factor": 16.0}, None),
    ("llama3", LLAMA3, None),
    ("llama3", {**LLAMA3, "factor": 32.0}, None),
    ("dynamic", {"factor": 4.0, "original_len": 4096}, None),
    ("dynamic", {"factor": 4.0, "original_len": 4096}, 1000),
    ("dynamic", {"factor": 4.0, "original_len": 4096}, 16384),
    ("yarn", YARN, None),
    ("yarn", {**YARN, "beta_fast": 4.0, "factor": 128.0}, None),
    ("yarn", {**YARN, "truncate": False}, None),
    ("yarn", {**YARN, "attention_factor": 1.0}, None),
    ("yarn", {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, None),
    ("yarn", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, None),
    ("longrope", LONGROPE, None),
    ("longrope", LONGROPE, 8192),
    ("longrope", LONGROPE, 8193),
    ("longrope", {**LONGROPE, "attention_factor": 1.0}, 8193),
    ("proportional", {"partial_rotary_factor": 0.25}, None),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": 4.0}, None),
    ("linear", {"factor": 4.0, "partial_rotary_factor": 0.5}, None),
    ("yarn", {**YARN, "partial_rotary_factor": 0.5}, None),
    ("dynamic", {"factor": 4.0, "original_len": 4096, "partial_rotary_factor": 0.5}, 9000),
    ("llama3", {**LLAMA3, "partial_rotary_factor": 0.5}, None),
]


def vectors(kind, keys, head_dim):
    if kind != "longrope":
        return keys
    pairs = int(head_dim * keys.get("partial_rotary_factor", 1.0)) // 2
    short = tuple(1 + 0.01 * i for i in range(pairs))
    return {
        **keys,
        "short_factor": short,
        "long_factor": tuple(1 + 15 * i / (pairs - 1) for i in range(pairs)),
    }


def theirs(kind, head_dim, keys, seq_len):
    keys = {"original_max_position_embeddings" if k == "original_len" else k: v for k, v in keys.items()}
    keys = {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}
    longest = 131072
    if kind == "dynamic":
        longest = keys.pop("original_max_position_embeddings")
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **keys},
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("kind", "keys", "seq_len"), CASES)
def test_equals_transformers(kind, keys, seq_len, head_dim, monkeypatch):
    keys = vectors(kind, keys, head_dim)
    ours, factor = rope_parameters(RopeConfig(type=kind, theta=5e5, head_dim=head_dim, **keys), seq_len)
    assert ours.dtype == torch.float64
    single, their_factor = theirs(kind, head_dim, keys, seq_len)
    assert ours.shape == single.shape
    assert factor == pytest.approx(their_factor, rel=1e-15)
    # Their float32 rounds: compare with the largest entry; and with their formula in float64, entry by entry.
    assert (single.double() - ours).abs().max() <= 1e-7 * ours.max()
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    double, _ = theirs(kind, head_dim, keys, seq_len)
    assert double.dtype == torch.float64
    assert (double - ours).abs().le(1e-7 * ours.abs()).all()


@pytest.mark.parametrize(
    ("kind", "keys", "seq_len", "entries", "factor", "total"),
    [
        ("default", {}, None, {1: 8.14617217e-01, 16: 3.76060307e-02, 35: 7.64496974e-04}, 1.0, 5.394233954),
        ("linear", {"factor": 16.0}, None, {1: 5.09135760e-02, 63: 1.53446294e-07}, 1.0, 0.337139622),
        (
            "dynamic",
            {"theta": 1e4, "factor": 4.0, "original_len": 4096},
            16384,
            {1: 8.31415951e-01, 35: 1.56186172e-03, 63: 8.88293835e-06},
            1.0,
            5.931716021,
        ),
        (
            "yarn",
            YARN,
            None,
            {20: 1.47339217e-02, 24: 4.87965113e-03, 31: 4.91454382e-04, 63: 1.53446294e-07},
            1.277258872,
            5.362622057,
        ),
        (
            "yarn",
            {"factor": 128.0, "original_len": 8192, "beta_fast": 4.0},
            None,
            {24: 7.29266508e-03, 29: 2.24529044e-03, 32: 6.12404896e-04, 63: 1.91807867e-08},
            1.485203026,
            5.386023453,
        ),
        (
            "llama3",
            LLAMA3,
            None,
            {24: 7.29266508e-03, 29: 2.16657063e-03, 31: 8.56751460e-04, 63: 3.06892588e-07},
            1.0,
            5.386058263,
        ),
        ("longrope", LONGROPE, None, {1: 8.06551695e-01, 63: 1.50622134e-06}, 1.143543750, 5.177545809),
    ],
)
def test_conformance_values(kind, keys, seq_len, entries, factor, total):
    config = RopeConfig(**{"theta": 5e5, **vectors(kind, keys, 128)}, type=kind, head_dim=128)
    inv_freq, attention = rope_parameters(config, seq_len)
    for index, value in entries.items():
        assert inv_freq[index].item() == pytest.approx(value, rel=1e-6)
    assert attention == pytest.approx(factor, abs=1e-9)
    assert inv_freq.sum().item() == pytest.approx(total, rel=1e-7)


NEUTRAL = {
    "linear": {},
    "ntk": {},
    "abf": {"extended_theta": 500000.0},
    "dynamic": {"original_len": 8192},
    "yarn": {"original_len": 8192},
    "dynamic_yarn": {"original_len": 8192},
    "llama3": {"original_len": 8192},
    "longrope": {"original_len": 8192, "short_factor": (1.0,) * HALF, "long_factor": (1.0,) * HALF},
    "proportional": {},
    "power": {},
}


@pytest.mark.parametrize("kind", NEUTRAL)
@pytest.mark.parametrize("seq_len", [None, 100, 8192])
def test_factor_one_is_the_default(kind, seq_len):
    extended, factor = rope_parameters(RopeConfig(type=kind, head_dim=64, **NEUTRAL[kind]), seq_len)
    base, _ = rope_parameters(RopeConfig(head_dim=64))
    torch.testing.assert_close(extended, base, rtol=1e-15, atol=0.0)
    assert factor == 1.0


def test_only_truncated_and_the_types_without_positions_have_no_neutral_setting():
    assert set(METHODS) - set(NEUTRAL) == {"default", "none", "truncated"}


@pytest.mark.parametrize("factor", [2.0, 16.0, 512.0])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_stays_between(factor, truncate):
    config = RopeConfig(
        type="yarn", theta=1e4, head_dim=128, factor=factor, original_len=4096, truncate=truncate
    )
    inv_freq, _ = rope_parameters(config)
    base, _ = rope_parameters(RopeConfig(theta=1e4, head_dim=128))
    turns = 4096 * base / (2 * math.pi)
    margin = 1e4 ** (2 / 128) if truncate else 1.0  # one pair
    fast, slow = turns > 32 * margin, turns < 1 / margin
    assert fast.sum() > 10 and slow.sum() > 10
    torch.testing.assert_close(inv_freq[fast], base[fast], rtol=1e-15, atol=0)
    torch.testing.assert_close(inv_freq[slow], base[slow] / factor, rtol=1e-14, atol=0)
    between = ~(fast | slow)
    assert ((inv_freq <= base * (1 + 1e-15)) & (inv_freq >= base / factor * (1 - 1e-15)))[between].all()
    assert (inv_freq.diff() < 0).all()


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
    inv_freq, _ = rope_parameters(RopeConfig(type="ntk", head_dim=64, factor=8.0))
    base, _ = rope_parameters(RopeConfig(head_dim=64))
    ratio = base / inv_freq
    assert ratio[0] == 1.0 and ratio[-1].item() == pytest.approx(8.0, rel=1e-12)
    torch.testing.assert_close(ratio, 8.0 ** (torch.arange(32).double() / 31), rtol=1e-12, atol=0)


def test_dynamic_methods_equal_the_fixed_ones_at_their_length():
    base = {"head_dim": 64, "original_len": 1024}
    for length in (1025, 4096):
        fixed = rope_parameters(RopeConfig(type="yarn", factor=length / 1024, **base))
        moving = rope_parameters(RopeConfig(type="dynamic_yarn", **base), length)
        assert torch.equal(fixed[0], moving[0]) and fixed[1] == moving[1]
    stretch = 4.0 * 4096 / 1024 - 3.0
    moving, _ = rope_parameters(RopeConfig(type="dynamic", factor=4.0, **base), 4096)
    fixed, _ = rope_parameters(RopeConfig(type="ntk", head_dim=64, factor=stretch))
    torch.testing.assert_close(moving, fixed, rtol=1e-14, atol=0)


def test_target_length_gives_the_factor():
    lengths = {"original_len": 8192, "target_len": 131072}
    for kind in ("linear", "ntk", "yarn", "llama3", "dynamic"):
        from_lengths = RopeConfig(type=kind, head_dim=64, **lengths)
        from_factor = RopeConfig(type=kind, head_dim=64, factor=16.0, original_len=8192)
        assert torch.equal(rope_parameters(from_lengths, 20000)[0], rope_parameters(from_factor, 20000)[0])


def test_base_change_by_hand_and_by_the_scaling_law():
    by_hand, _ = rope_parameters(RopeConfig(type="abf", theta=1e4, head_dim=128, extended_theta=1e6))
    assert torch.equal(by_hand, rope_parameters(RopeConfig(theta=1e6, head_dim=128))[0])
    law = RopeConfig(type="abf", theta=1e4, head_dim=128, original_len=4096, target_len=100_000)
    assert critical_dim(128, theta=1e4, original_len=4096) == 92
    # Llama 2 to 100,000 tokens: what the law says, and Code Llama's base of 1e6 is above.
    assert abf_theta(law) == pytest.approx(701_472, rel=1e-4)
    kept = base_for_length(128, theta=1e4, original_len=4096, target_len=131_072)
    assert longest_context(128, theta=1e4, original_len=4096, new_theta=kept) == pytest.approx(131_072)


def test_truncated_basis_has_three_levels():
    config = RopeConfig(type="truncated", theta=1e4, head_dim=128, original_len=2048)
    inv_freq, _ = rope_parameters(config)
    base, cut = rope_parameters(RopeConfig(theta=1e4, head_dim=128))[0], 2 * math.pi / 2048
    assert torch.equal(inv_freq[base >= cut], base[base >= cut])
    assert (inv_freq[(base < cut) & (base >= cut / 8)] - cut / 16).abs().max() < 1e-18
    assert (inv_freq[base < cut / 8] == 0).all() and (inv_freq == 0).any()


def test_power_basis_and_none():
    base, _ = rope_parameters(RopeConfig(head_dim=8))
    inv_freq, _ = rope_parameters(RopeConfig(type="power", power=2.0, head_dim=8))
    expected = base * torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64) ** 2
    torch.testing.assert_close(inv_freq, expected, rtol=1e-15, atol=0)
    assert not rope_parameters(RopeConfig(type="none", head_dim=8))[0].any()


def test_mixed_window_leaves_short_sequences_alone():
    config = RopeConfig(type="yarn", head_dim=64, mixed_window=True, **YARN)
    base = rope_parameters(RopeConfig(head_dim=64))
    short, long = rope_parameters(config, 8192), rope_parameters(config, 8193)
    assert torch.equal(short[0], base[0]) and short[1] == 1.0
    assert not torch.equal(long[0], base[0]) and long[1] > 1.0


def test_registry_and_keys_name_the_same_methods():
    assert METHODS.keys() == METHOD_KEYS.keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "liner"}, "did you mean 'linear'"),
        ({"type": "zzz"}, "Choose one of abf, default, dynamic, dynamic_yarn, linear, llama3"),
        ({"factor": 8.0}, "rope.factor=8.0 does not belong to rope.type=default.*linear, llama3, longrope"),
        (
            {"type": "linear", "factor": 2.0, "beta_fast": 64.0},
            "rope.beta_fast=64.0 does not belong.*to dynamic_yarn, yarn",
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
        ({"type": "yarn", "factor": 2.0}, "rope.type=yarn needs rope.original_len"),
        ({"type": "yarn", **YARN, "beta_slow": 40.0}, "rope.beta_slow=40.0 must be positive and below"),
        ({"type": "yarn", **YARN, "mscale": 1.0}, "work as a pair"),
        (
            {"type": "yarn", **YARN, "target_len": 4096},
            "target_len=4096 is shorter than rope.original_len=8192",
        ),
        ({"type": "yarn", **YARN, "target_len": 16384}, "rope.factor=16.0 contradicts.*= 2.0"),
        ({"type": "linear", "target_len": 4096}, "needs rope.original_len"),
        ({"type": "longrope", **LONGROPE}, "rope.type=longrope needs rope.long_factor"),
        (
            {"type": "longrope", **LONGROPE, "short_factor": (1.0,) * 32, "long_factor": (1.0,) * 31},
            "rope.long_factor has 31 values, but 64 rotary dims make 32 pairs",
        ),
        (
            {"type": "longrope", **LONGROPE, "short_factor": (0.0,) * 32, "long_factor": (1.0,) * 32},
            "rope.short_factor holds 0.0",
        ),
        ({"type": "abf"}, "rope.type=abf needs rope.extended_theta"),
        ({"type": "abf", "extended_theta": 10.0}, "below rope.theta"),
        ({"type": "ntk", "factor": 2.0, "mixed_window": True}, "rope.mixed_window needs rope.original_len"),
        ({"mixed_window": True}, "rope.mixed_window=True does not belong to rope.type=default"),
        ({"partial_rotary_factor": 1.5}, "rope.partial_rotary_factor=1.5"),
        ({"partial_rotary_factor": 0.05}, "turns 3 of rope.head_dim=64"),
        ({"none_layers": (-1,)}, "rope.none_layers has -1"),
        ({"head_dim": 7}, "rope.head_dim=7 must be even"),
        ({"head_dim": 0}, "rope.head_dim=0"),
    ],
)
def test_refusals_name_the_key(keys, message):
    with pytest.raises(ConfigError, match=message.replace("rope.", "model.rope.")):
        rope_parameters(RopeConfig(**{"head_dim": 64, **keys}))


def test_head_dim_comes_from_the_model():
    assert with_head_dim(RopeConfig(), 64).head_dim == 64
    assert with_head_dim(RopeConfig(head_dim=64), 64).head_dim == 64
    with pytest.raises(ConfigError, match=r"rope\.head_dim=32 differs from model\.head_dim=64"):
        with_head_dim(RopeConfig(head_dim=32), 64)
