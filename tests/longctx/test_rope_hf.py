"""Rotary settings of Hugging Face configs, both ways; the exported model computes the same logits."""

import dense
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.config.schema import ModelConfig
from longctx.errors import ConfigError
from longctx.model.decoder import Decoder
from longctx.model.init import init_parameters_
from longctx.model.weights import to_hf_state
from longctx.rope import RopeConfig, rope_parameters
from longctx.rope.hf import from_hf, from_hf_config, max_position_embeddings, to_hf

HEAD_DIM, PAIRS = 16, 8
ORIGINAL = "original_max_position_embeddings"
SHORT = tuple(1 + 0.01 * i for i in range(PAIRS))
LONG = tuple(1 + 0.5 * i for i in range(PAIRS))
EXTENDED = {"factor": 4.0, "original_len": 32}
EXPORTED = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "abf": {"extended_theta": 1e6},
    "abf law": {"original_len": 32, "target_len": 128},
    "dynamic": EXTENDED,
    "yarn": EXTENDED,
    "yarn mscale": {**EXTENDED, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn ramp": {**EXTENDED, "type": "yarn", "truncate": False, "beta_fast": 4.0},
    "llama3": {**EXTENDED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**EXTENDED, "short_factor": SHORT, "long_factor": LONG},
    "proportional": {"partial_rotary_factor": 0.5},
    "power": {"power": 2.0},
    "mixed linear": {"type": "linear", **EXTENDED, "mixed_window": True},
}
SHARED = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "yarn mscale",
    "yarn ramp",
    "llama3",
    "longrope",
    "proportional",
)


def config_of(name, **keys):
    return RopeConfig(**{"type": name.split()[-1 if name.startswith("mixed") else 0], "theta": 1e4,
                         "head_dim": HEAD_DIM, **EXPORTED[name], **keys})  # fmt: skip


def llama(parameters, longest):
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=HEAD_DIM, max_position_embeddings=longest, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters=parameters, attn_implementation="eager",
    )  # fmt: skip


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("name", EXPORTED)
def test_logits_of_the_exported_model_are_equal(name, length):
    """Below and beyond the original length of 32; weights large enough that positions matter."""
    rope = config_of(name)
    shape = ModelConfig(
        num_layers=2, hidden_size=32, ffn_size=48, num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM,
        vocab_size=64, rope=rope, init_std=0.3,
    )  # fmt: skip
    model = Decoder(shape, dense.attend).float()
    init_parameters_(model, 0, shape)
    theirs = AutoModelForCausalLM.from_config(llama(to_hf(rope), max_position_embeddings(rope, 128)))
    state = to_hf_state(model.state_dict())
    theirs.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.arange(length) * 7 % 64
    with torch.no_grad():
        ours = model(ids, torch.arange(length), layout=dense.packed((length,)))
        expected = theirs.eval()(ids[None]).logits[0]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SHARED)
def test_round_trip_of_shared_types(name):
    rope, longest = config_of(name), max_position_embeddings(config_of(name), 128)
    back = from_hf(to_hf(rope), head_dim=HEAD_DIM, max_position_embeddings=longest)
    for length in (None, 20, 100):
        ours, again = rope_parameters(rope, length), rope_parameters(back, length)
        assert torch.equal(ours[0], again[0]) and ours[1] == again[1]
    assert to_hf(back) == to_hf(rope)


def test_old_and_new_configs_mean_the_same():
    new = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, ORIGINAL: 8192, "low_freq_factor": 1,
           "high_freq_factor": 4}  # fmt: skip
    old = {key: value for key, value in new.items() if key not in ("rope_type", "rope_theta")}
    base = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    found = from_hf_config({**base, "rope_parameters": new})
    assert found == from_hf_config({**base, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **old}})
    assert (found.type, found.head_dim, found.original_len, found.factor) == ("llama3", 16, 8192, 8.0)


def test_phi3_keeps_its_original_length_beside_the_factors():
    config = {"hidden_size": 64, "num_attention_heads": 4, ORIGINAL: 4096, "rope_theta": 1e4,
              "max_position_embeddings": 131072, 
              "rope_scaling": {"type": "su", **ONES, "long_factor": [2.0] * 8}}  # fmt: skip
    found = from_hf_config(config)
    assert (found.type, found.original_len, found.factor) == ("longrope", 4096, 32.0)
    theirs = llama({"rope_type": "longrope", "rope_theta": 1e4, **to_hf(found)}, 131072)
    assert ROPE_INIT_FUNCTIONS["longrope"](theirs)[1] == pytest.approx(rope_parameters(found)[1])


def test_layers_without_positions_are_imported():
    config = {"head_dim": 16, "rope_theta": 1e4, "no_rope_layers": [1, 1, 0, 1]}
    assert from_hf_config(config).none_layers == (2,)


ONES = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
BLEND = {"low_freq_factor": 1, "high_freq_factor": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: 32}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, f"'yarn' without {ORIGINAL}.*=128, the extended length"),
        ({"rope_type": "llama3", "factor": 4.0, **BLEND}, f"without {ORIGINAL}"),
        ({"rope_type": "longrope", **ONES}, f"without {ORIGINAL}"),
        ({"rope_type": "yarm"}, "did you mean 'yarn'"),
        ({**YARN, "beta_fats": 3}, "beta_fats=3 does not belong.*; did you mean 'beta_fast'"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "beta_fast=3 does not belong.*'linear'"),
        ({"rope_type": "linear"}, "'linear' needs factor"),
        ({"rope_type": "llama3", ORIGINAL: 32, "factor": 4.0}, "needs low_freq_factor"),
        ({"rope_type": "longrope", ORIGINAL: 32, **ONES, "short_factor": [1.0] * 7}, "7 values"),
        ({"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}, "differ by layer type"),
    ],
)  # fmt: skip
def test_imports_that_would_be_wrong_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(parameters, head_dim=HEAD_DIM, theta=1e4, max_position_embeddings=128)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "none"}, "rope.type=none has no form in transformers"),
        ({"type": "dynamic_yarn", "original_len": 32}, "no form in transformers; fix the length"),
        ({"type": "truncated", "original_len": 32}, "rope.type=truncated stops pair"),
        ({"type": "yarn", **EXTENDED, "mixed_window": True}, "has one for both.*attention_factor=1.0"),
        ({"partial_rotary_factor": 0.5}, "turns the first dims"),
    ],
)
def test_exports_that_transformers_cannot_express_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        to_hf(RopeConfig(head_dim=HEAD_DIM, theta=1e4, **keys))


def test_partial_rotary_is_exported_where_the_architecture_has_it():
    exported = to_hf(
        RopeConfig(type="linear", factor=2.0, head_dim=16, partial_rotary_factor=0.5), partial=True
    )
    assert exported["partial_rotary_factor"] == 0.5
    assert from_hf(exported, head_dim=16).partial_rotary_factor == 0.5
