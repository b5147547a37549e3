"""Hugging Face's dense Llama family and ours: same names both ways, same logits, same gradients."""

import dense
import pytest
import torch
import transformers
from torch.nn import functional as F

from longctx.config.schema import ModelConfig, RopeConfig
from longctx.errors import ConfigError
from longctx.model.decoder import Decoder
from longctx.model.loss import token_loss
from longctx.model.params import parameter_shapes
from longctx.model.weights import from_hf, from_hf_state, to_hf, to_hf_state

VOCAB = 96
LENGTHS = (23, 17)
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LLAMA3 = {"factor": 8.0, "original_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_HF = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


# family -> (their class and its extra keys, our extra keys)
FAMILIES = {
    "llama": ("Llama", {"head_dim": 8}, {}),
    "llama3.1": (
        "Llama",
        {"head_dim": 8, "rope_parameters": LLAMA3_HF},
        {"rope": {"type": "llama3", **LLAMA3}},
    ),
    "llama-tied": ("Llama", {"head_dim": 8, "tie_word_embeddings": True}, {"tied_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 6}, {"sliding_window": 6}),
    "mistral-full": ("Mistral", {"head_dim": 16, "sliding_window": None}, {"head_dim": 16}),
    "qwen2": ("Qwen2", {}, {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True, "head_dim": 16}),
}


def their_model(family):
    name, keys, _ = FAMILIES[family]
    rope = {"rope_type": "default", "rope_theta": 1e4, **keys.get("rope_parameters", {})}
    shared = {
        "num_hidden_layers": 3,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    config = getattr(transformers, f"{name}Config")(
        **{"tie_word_embeddings": False, **SIZES, **shared, **keys, "rope_parameters": rope}
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norm weights too
            center = 1.0 if parameter.ndim == 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(center + 0.2 * noise)
    return model


def our_config(family):
    keys = {"head_dim": 8, "tied_embeddings": False, **FAMILIES[family][2]}
    rope = RopeConfig(**{"theta": 1e4, **keys.pop("rope", {})})
    return ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_size=48,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=VOCAB,
        rope=rope,
        **keys,
    )


def our_model(family, state):
    model = Decoder(our_config(family), dense.attend)
    model.load_state_dict(from_hf_state(state, model.config))
    return model


def token_ids():
    return torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_packed_batch_equal_each_document_alone(family):
    theirs = their_model(family)
    ours = our_model(family, theirs.state_dict())
    with torch.no_grad():
        logits = ours(token_ids(), dense.positions(LENGTHS), layout=dense.packed(LENGTHS))
        expected = torch.cat([theirs(ids[None]).logits[0] for ids in token_ids().split(LENGTHS)])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_cases_can_tell_the_rope_types_and_the_window_apart():
    for family, plain in (("llama3.1", "llama"), ("mistral", "llama")):
        state = their_model(family).state_dict()
        logits = [
            our_model(kind, state)(token_ids(), dense.positions(LENGTHS), layout=dense.packed(LENGTHS))
            for kind in (family, plain)
        ]
        assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[1].abs().max()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
def test_gradients_equal(family):
    theirs = their_model(family)
    ours = our_model(family, theirs.state_dict())
    ids = token_ids()
    mask = torch.ones(len(ids), dtype=torch.bool)
    mask[[LENGTHS[0] - 1, -1]] = False  # the last token of a document has no target
    logits = ours(ids, dense.positions(LENGTHS), layout=dense.packed(LENGTHS))
    token_loss(logits, ids.roll(-1), mask)[0].backward()
    for document in ids.split(LENGTHS):
        shifted = theirs(document[None]).logits[0, :-1]
        F.cross_entropy(shifted, document[1:], reduction="sum").backward()
    expected = {from_hf(name): p.grad for name, p in theirs.named_parameters()}
    floor = 1e-3 * torch.stack([g.abs().max() for g in expected.values()]).median()
    for name, parameter in ours.named_parameters():
        bound = 1e-5 * torch.maximum(expected[name].abs().max(), floor)
        assert (parameter.grad - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_names_and_bytes(family):
    state = their_model(family).state_dict()
    ours = from_hf_state(state, our_config(family))
    assert ours.keys() == parameter_shapes(our_config(family)).keys()
    back = to_hf_state(ours)
    tied = {"lm_head.weight"} if "tied" in family else set()
    assert back.keys() == state.keys() - tied
    assert all(back[name].data_ptr() == state[name].data_ptr() for name in back)


def test_names_are_inverse():
    for family in FAMILIES:
        for name in parameter_shapes(our_config(family)):
            assert from_hf(to_hf(name)) == name


@pytest.mark.parametrize(
    "name", ["layers.0.attention.wz.weight", "model.layers.x.mlp.up_proj.weight", "layers.1", "head"]
)
def test_unknown_names_are_refused(name):
    for translate in (to_hf, from_hf):
        with pytest.raises(KeyError, match=name):
            translate(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "q_norm.*no parameter of",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(7)}),
            r"model\.norm\.weight has shape \(7,\).*\(32,\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    state = dict(their_model("llama").state_dict())
    change(state)
    with pytest.raises(ConfigError, match=message):
        from_hf_state(state, our_config("llama"))


def test_derived_buffers_of_old_exports_are_ignored():
    state = dict(their_model("llama").state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert "head.weight" in from_hf_state(state, our_config("llama"))
