"""config.json of the dense Llama family and our model section, both ways, strictly. No torch."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ..config.check import check_model
from ..config.schema import ModelConfig, RopeConfig
from ..errors import ConfigError
from ..rope.hf import from_hf_config, max_position_embeddings, to_hf
from ..rope.spec import with_head_dim

CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the class that transformers and vLLM load."""

_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
"""What each class of transformers takes for a key that config.json does not have, where they differ."""
_THETA = 1e4
"""The same for the rotary base in all of them; Llama 2's own files have none."""
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"), int),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), (int, float)),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), bool),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
    **dict.fromkeys(("architectures", "layer_types", "no_rope_layers"), list),
}
"""What the values of optional keys are, unless null."""
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
_SAME: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""Our keys -> theirs, where the values are alike."""


def model_config(found: Mapping[str, Any], where: str) -> ModelConfig:
    """The model section for a config.json.

    Args:
        found: its content.
        where: the file, for messages.

    Raises:
        ConfigError: an architecture, a setting or a rotary type without support; the nearest one is named.
    """
    _check_types(found, where)
    kind = _kind(found, where)
    found = {"rope_theta": _THETA, **_ABSENT[kind], **found}
    _check_plain(found, kind, where)
    heads = int(found["num_attention_heads"])
    values: dict[str, Any] = {ours: found[theirs] for ours, theirs in _SAME.items() if theirs in found}
    values = {key: value for key, value in values.items() if value is not None}
    values.setdefault("num_kv_heads", heads)
    values.setdefault("head_dim", int(found["hidden_size"]) // heads)
    values.setdefault("norm_eps", 1e-6)
    values.setdefault("tied_embeddings", False)
    model = ModelConfig(
        **values,
        rope=_rope(found, kind, where),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        sliding_window=_window(found, kind, where),
    )
    check_model(model)
    return model


def kind_of(model: ModelConfig) -> str:
    """The model_type that computes what this model computes.

    Raises:
        ConfigError: none of theirs does.
    """
    if model.qk_norm and model.attention_bias:
        raise ConfigError(
            "model.qk_norm=true with model.attention_bias=true is no architecture of transformers (Qwen3 has "
            "the norm, Qwen2 the bias); only one of them can be exported"
        )
    if model.rope.none_layers:
        raise ConfigError(
            f"model.rope.none_layers={list(model.rope.none_layers)}: {', '.join(CLASSES)} turn every layer "
            "in transformers; models with layers without positions cannot be exported"
        )
    if model.qk_norm:
        return "qwen3"
    if model.attention_bias:
        return "qwen2"
    return "mistral" if model.sliding_window is not None else "llama"


def hf_config(
    model: ModelConfig, *, seq_len: int, dtype: str, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json with which transformers and vLLM compute what this model computes.

    Args:
        model: with a vocabulary size.
        seq_len: longest sequence in tokens that it was trained on.
        dtype: of the weights, as torch names it.
        carried: the config.json it was imported from; its other keys (token ids...) are kept.

    Raises:
        ConfigError: no architecture of theirs, or no rotary type of theirs, computes it.
    """
    kind = kind_of(model)
    rope = to_hf(with_head_dim(model.rope, model.head_dim))
    values: dict[str, Any] = dict(carried or {})
    for old in ("rope_scaling", "torch_dtype", "layer_types", "max_window_layers", "no_rope_layers"):
        values.pop(old, None)
    values |= {theirs: getattr(model, ours) for ours, theirs in _SAME.items()}
    longest = max_position_embeddings(model.rope, seq_len)
    if rope["rope_type"] == "default":
        longest = max(longest, int((carried or {}).get("max_position_embeddings") or 0))
    values |= {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **_window_keys(model, kind),
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope  # transformers 4 and servers that follow it
    return values


def _check_types(found: Mapping[str, Any], where: str) -> None:
    """Refuse what JSON allows and no config of theirs has, before it is computed with."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} is no JSON object; restore the file that belongs to the weights")
    missing = [key for key in _REQUIRED if not isinstance(found.get(key), int)]
    if missing:
        raise ConfigError(f"{where} has no {missing[0]}; restore the file that belongs to the weights")
    for key, wanted in _TYPES.items():
        if found.get(key) is not None and not isinstance(found[key], wanted):
            raise ConfigError(f"{where}: {key}={found[key]!r} has the wrong type; restore the file")


def _kind(found: Mapping[str, Any], where: str) -> str:
    kind = str(found.get("model_type") or "")
    named = (found.get("architectures") or [CLASSES.get(kind, kind)])[0]
    if kind in CLASSES and named == CLASSES[kind]:
        return kind
    close = get_close_matches(str(named), CLASSES.values(), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{where}: {named or 'no architecture'} is not supported; the nearest supported one is {close}. "
        f"Supported are {', '.join(CLASSES.values())}"
    )


def _check_plain(found: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse settings that change what is computed and that we do not have."""
    wanted = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "pretraining_tp": 1}
    if kind != "qwen2":
        wanted["attention_bias"] = False
    for key, value in wanted.items():
        if found.get(key, value) not in (value, None):
            extra = "; dequantize the model to bfloat16 first" if key == "quantization_config" else ""
            raise ConfigError(f"{where}: {key}={found[key]!r} is not supported, only {value!r}{extra}")


def _rope(found: Mapping[str, Any], kind: str, where: str) -> RopeConfig:
    try:
        rope = from_hf_config(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    partial = rope.partial_rotary_factor != 1.0 and rope.type != "proportional"
    if partial or rope.none_layers:
        key = "partial_rotary_factor" if partial else "no_rope_layers"
        raise ConfigError(
            f"{where}: {key} has no effect on a {CLASSES[kind]} in transformers, which turns whole heads in "
            "every layer; remove it, or set model.rope in training if that is what the weights were made for"
        )
    return replace(rope, head_dim=0)


def _window(found: Mapping[str, Any], kind: str, where: str) -> int | None:
    """The sliding window, if every layer has it."""
    window = found.get("sliding_window")
    if window is None or (kind != "mistral" and not found.get("use_sliding_window", False)):
        return None
    if kind == "mistral":
        return int(window)
    layers = int(found["num_hidden_layers"])
    first = int(found.get("max_window_layers") or 0)
    types = found.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * layers
    sliding = types[:layers].count("sliding_attention")
    if 0 < sliding < layers:
        raise ConfigError(
            f"{where}: {sliding} of {layers} layers have a sliding window; only all or none are supported"
        )
    return int(window) if sliding else None


def _window_keys(model: ModelConfig, kind: str) -> dict[str, Any]:
    if kind == "llama":
        return {}
    if kind == "mistral":
        return {"sliding_window": model.sliding_window}
    sliding = model.sliding_window is not None
    return {
        "use_sliding_window": sliding,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0 if sliding else model.num_layers,
        "layer_types": ["sliding_attention" if sliding else "full_attention"] * model.num_layers,
    }
