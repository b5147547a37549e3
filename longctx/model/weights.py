"""Hugging Face names of dense Llama-family parameters, and ours.

Llama, Mistral, Qwen2 and Qwen3 share one naming; a model's config decides which names exist. The
layouts are equal too: both rotate half-split and store matrices as [out, in], so conversion only
renames. Shapes: as in `params`.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from torch import Tensor

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .params import EMBEDDING, HEAD, parameter_shapes

OUTER = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
"""Our names outside the layers -> Hugging Face's."""

MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""Our modules inside a layer -> Hugging Face's."""

_OUTER_BACK = {theirs: ours for ours, theirs in OUTER.items()}
_MODULES_BACK = {theirs: ours for ours, theirs in MODULES.items()}
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old exports carry; made from the config


def to_hf(name: str) -> str:
    """Hugging Face's name of one of our parameters.

    Raises:
        KeyError: the name is none of ours.
    """
    return _translate(name, "layers.", "model.layers.", OUTER, MODULES)


def from_hf(name: str) -> str:
    """Our name of one of Hugging Face's parameters.

    Raises:
        KeyError: a dense Llama, Mistral, Qwen2 or Qwen3 has no such parameter.
    """
    return _translate(name, "model.layers.", "layers.", _OUTER_BACK, _MODULES_BACK)


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A whole Hugging Face state dict under our names; the tensors are not copied.

    A tied model's `lm_head.weight` is dropped: it is the embedding again.

    Raises:
        ConfigError: a parameter is missing, unknown or of another shape, named with its expectation.
    """
    names = our_names({name: tuple(tensor.shape) for name, tensor in state.items()}, config)
    return {ours: state[theirs] for theirs, ours in names.items()}


def our_names(found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, str]:
    """Their names of a model's parameters -> ours, once all of them are there with the right shape.

    Raises:
        ConfigError: as `from_hf_state`.
    """
    kept = {name: shape for name, shape in found.items() if not _DERIVED.search(name)}
    if config.tied_embeddings:
        kept.pop(OUTER[HEAD], None)
    shapes = {to_hf(name): shape for name, shape in parameter_shapes(config).items()}
    _check_names(kept, shapes)
    for name, shape in shapes.items():
        if kept[name] != shape:
            raise ConfigError(
                f"{name} has shape {kept[name]} but the model section asks for {shape}; "
                "set the model section to the checkpoint's config"
            )
    return {name: from_hf(name) for name in kept}


def to_hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under Hugging Face's names; the tensors are not copied.

    A tied model has no head, as in Hugging Face's own safetensors files.
    """
    return {to_hf(name): tensor for name, tensor in state.items()}


def _translate(
    name: str, layers: str, target: str, outer: Mapping[str, str], modules: Mapping[str, str]
) -> str:
    if name in outer:
        return outer[name]
    number, _, inner = name.removeprefix(layers).partition(".")
    module, _, kind = inner.rpartition(".")
    known = number.isdecimal() and module in modules and kind in ("weight", "bias")
    if not name.startswith(layers) or not known:
        raise KeyError(name)
    return f"{target}{number}.{modules[module]}.{kind}"


def _check_names(present: Iterable[str], expected: Mapping[str, object]) -> None:
    missing, unknown = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    if unknown:
        close = get_close_matches(unknown[0], missing or expected, n=1)
        hint = f"; the closest expected name is {close[0]}" if close else ""
        raise ConfigError(
            f"{unknown[0]} ({len(unknown)} such) is no parameter of this model{hint}; check "
            "model.num_layers, attention_bias, qk_norm and tied_embeddings against the checkpoint's config"
        )
    if missing:
        raise ConfigError(
            f"{missing[0]} is missing from the checkpoint ({len(missing)} such); add its shard, or check "
            "model.num_layers, attention_bias, qk_norm and tied_embeddings against the checkpoint's config"
        )
