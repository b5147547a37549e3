"""Rotary settings of Hugging Face configs, both ways, strictly. No torch unless vectors are needed.

transformers only warns about unknown types and keys, and where yarn, longrope or llama3 lack
`original_max_position_embeddings` it silently takes the extended length. Here both are errors.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ..config.schema import RopeConfig
from ..errors import ConfigError
from .spec import check_rope, extension_factor, rotary_dim, with_head_dim

ORIGINAL = "original_max_position_embeddings"

_SAME: tuple[str, ...] = ("factor", "partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim")
_SAME += ("beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor")
OURS: Mapping[str, str] = {
    **{name: name for name in (*_SAME, "short_factor", "long_factor")},
    "rope_theta": "theta",
    ORIGINAL: "original_len",
}
"""Their keys -> ours."""

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
HF_KEYS: Mapping[str, frozenset[str]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "dynamic": _COMMON | {"factor", ORIGINAL},
    "yarn": _COMMON
    | {"factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    | {"truncate"},
    "longrope": _COMMON | {"factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"},
    "llama3": _COMMON | {"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "proportional": _COMMON | {"factor"},
}
"""Keys of each of their types."""
NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")
OLD_NAMES = {"su": "longrope"}
"""Names of early Phi-3 configs."""


def from_hf(
    parameters: Mapping[str, Any] | None,
    *,
    head_dim: int,
    theta: float | None = None,
    max_position_embeddings: int | None = None,
) -> RopeConfig:
    """Our form of a `rope_parameters` (transformers 5) or `rope_scaling` (4) mapping.

    Args:
        parameters: as in config.json; None: no extension.
        head_dim: dims of a head.
        theta: `rope_theta` beside the mapping (transformers 4); the mapping's own wins.
        max_position_embeddings: dynamic: the original length; yarn and longrope without `factor`:
            the length after the extension.

    Raises:
        ConfigError: an unknown type or key, a missing original length, or different settings per
            layer type.
    """
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"rope_parameters differ by layer type ({', '.join(nested)}); only one setting for all "
            "layers is supported, with model.rope.none_layers for layers without"
        )
    kind = str(given.get("rope_type", given.get("type", "default")))
    kind = OLD_NAMES.get(kind, kind)
    _check_keys(kind, given)
    values = {OURS[key]: value for key, value in given.items() if key in OURS}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if "theta" not in values and theta is not None:
        values["theta"] = float(theta)
    _fill_lengths(kind, values, max_position_embeddings)
    if kind == "llama3":
        _require(values, kind, "factor", "low_freq_factor", "high_freq_factor")
    if kind in ("linear", "dynamic"):
        _require(values, kind, "factor")
    config = with_head_dim(RopeConfig(type=kind, **_typed(values)), head_dim)
    check_rope(config)
    return config


def from_hf_config(config: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings of a whole config.json: of transformers 4 or 5, with Phi-3's and SmolLM3's extras.

    Raises:
        ConfigError: as `from_hf`; or the config holds no base.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for key in (ORIGINAL, "partial_rotary_factor"):
        wanted = key != ORIGINAL or _type_of(parameters) in NEEDS_ORIGINAL
        if config.get(key) is not None and wanted:
            parameters[key] = config[key]
    theta = config.get("rope_theta")
    if theta is None and "rope_theta" not in parameters:
        raise ConfigError("config.json has no rope_theta; add the base that the model was trained with")
    found = from_hf(
        parameters,
        head_dim=int(head_dim),
        theta=theta,
        max_position_embeddings=config.get("max_position_embeddings"),
    )
    uses = config.get("no_rope_layers") or ()  # 1: the layer turns
    return replace(found, none_layers=tuple(layer for layer, turns in enumerate(uses) if not turns))


def to_hf(config: RopeConfig, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` with which transformers computes the same frequencies.

    What has no type of its own there becomes `default` with another base or `longrope` with one
    divisor for each pair. Also set the config's `max_position_embeddings` by
    `max_position_embeddings`, and `no_rope_layers` from `none_layers` where the architecture has it.

    Args:
        config: with `head_dim`.
        partial: whether the architecture reads `partial_rotary_factor` (Llama, Mistral and Qwen do
            not).

    Raises:
        ConfigError: transformers cannot express it.
    """
    check_rope(config)
    if config.partial_rotary_factor != 1.0 and config.type != "proportional" and not partial:
        raise ConfigError(
            f"model.rope.partial_rotary_factor={config.partial_rotary_factor} turns the "
            f"first dims of a head, "
            "which this architecture does not do in transformers; use "
            "model.rope.type=proportional, or export "
            "to an architecture with partial rotary"
        )
    exported = _mixed(config) if config.mixed_window else _EXPORTS[config.type](config)
    if config.partial_rotary_factor != 1.0:
        exported["partial_rotary_factor"] = config.partial_rotary_factor
    return exported


def max_position_embeddings(config: RopeConfig, seq_len: int) -> int:
    """What the exported config's key of this name must be.

    Args:
        config: the exported method.
        seq_len: the longest sequence the model is meant for.
    """
    if config.type == "dynamic":
        assert config.original_len is not None, "check_rope lets no dynamic pass without original_len"
        return config.original_len  # transformers takes it for the original length
    return max(seq_len, config.target_len or 0)


def _check_keys(kind: str, given: Mapping[str, Any]) -> None:
    if kind not in HF_KEYS:
        close = get_close_matches(kind, HF_KEYS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"rope_type={kind!r} is unknown; {hint}Known: {', '.join(HF_KEYS)}")
    strays = sorted(given.keys() - HF_KEYS[kind])
    if strays:
        known = sorted(HF_KEYS[kind] - {"type"})
        close = get_close_matches(strays[0], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"{strays[0]}={given[strays[0]]!r} does not belong to rope_type={kind!r}; {hint}"
            f"Remove it, or use one of {', '.join(known)}"
        )


def _fill_lengths(kind: str, values: dict[str, Any], longest: int | None) -> None:
    """The original length, or its refusal, and a factor that is left to the lengths."""
    if kind in NEEDS_ORIGINAL and "original_len" not in values:
        raise ConfigError(
            f"rope_type={kind!r} without {ORIGINAL}: transformers would take max_position_embeddings"
            f"={longest}, the extended length, and compute wrong frequencies; add {ORIGINAL}, the length "
            "before the extension"
        )
    if kind == "dynamic":
        values["original_len"] = values.get("original_len", longest)
    if kind in ("yarn", "longrope") and "factor" not in values:
        if longest is None:
            raise ConfigError(f"rope_type={kind!r} needs factor, or max_position_embeddings beside it")
        values["factor"] = longest / values["original_len"]


def _require(values: Mapping[str, Any], kind: str, *names: str) -> None:
    for name in names:
        if name not in values:
            raise ConfigError(f"rope_type={kind!r} needs {name}, which is missing; add it")


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as our fields have them: JSON writes 8 where 8.0 is meant."""
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            typed[key] = tuple(float(each) for each in value)
        elif isinstance(value, bool):
            typed[key] = value
        else:
            typed[key] = int(value) if key == "original_len" else float(value)
    return typed


def _type_of(parameters: Mapping[str, Any]) -> str:
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    return OLD_NAMES.get(kind, kind)


def _same_type(config: RopeConfig, *names: str) -> dict[str, Any]:
    """Their mapping of a type that both sides have."""
    exported: dict[str, Any] = {"rope_type": config.type, "rope_theta": config.theta}
    for name in names:
        value = extension_factor(config) if name == "factor" else getattr(config, OURS[name])
        if value is not None:
            exported[name] = list(value) if isinstance(value, tuple) else value
    return exported


def _export_yarn(config: RopeConfig) -> dict[str, Any]:
    names = ("factor", ORIGINAL, "beta_fast", "beta_slow", "truncate")
    return _same_type(config, *names, "attention_factor", "mscale", "mscale_all_dim")


def _export_longrope(config: RopeConfig) -> dict[str, Any]:
    from .frequencies import rope_parameters

    exported = _same_type(config, "factor", ORIGINAL, "short_factor", "long_factor")
    # transformers would otherwise derive it from factor or from max_position_embeddings.
    return exported | {"attention_factor": rope_parameters(config)[1]}


def _export_ntk(config: RopeConfig) -> dict[str, Any]:
    from .frequencies import ntk_theta

    return {"rope_type": "default", "rope_theta": ntk_theta(config, extension_factor(config))}


def _export_abf(config: RopeConfig) -> dict[str, Any]:
    from .frequencies import abf_theta

    return {"rope_type": "default", "rope_theta": abf_theta(config)}


def _export_vectors(config: RopeConfig) -> dict[str, Any]:
    divisors, attention = _divisors(config)
    return _longrope(config, divisors, divisors, attention)


def _mixed(config: RopeConfig) -> dict[str, Any]:
    """Original frequencies up to `original_len`, extended beyond: what longrope does, but for its factor."""
    divisors, attention = _divisors(replace(config, mixed_window=False))
    if attention != 1.0:
        raise ConfigError(
            f"model.rope.mixed_window=true with model.rope.type={config.type} has attention "
            f"factor {attention:.4g} for "
            "long documents and 1 for short ones; transformers has one for both. Set "
            "model.rope.attention_factor=1.0 before training, or export with model.rope.mixed_window=false"
        )
    return _longrope(config, [1.0] * len(divisors), divisors, 1.0)


def _longrope(config: RopeConfig, short: list[float], long: list[float], attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": config.theta,
        "factor": extension_factor(config),
        ORIGINAL: config.original_len or 1,
        "short_factor": short,
        "long_factor": long,
        "attention_factor": attention,
    }


def _divisors(config: RopeConfig) -> tuple[list[float], float]:
    """Base frequency / frequency of each pair, and the attention factor."""
    from .frequencies import original, rope_parameters

    inv_freq, attention = rope_parameters(config)
    if not bool(inv_freq.all()):
        pair = int((inv_freq == 0).nonzero()[0])
        raise ConfigError(
            f"model.rope.type={config.type} stops pair {pair} of {rotary_dim(config) // 2}; "
            f"no finite divisor in "
            "transformers' longrope does that. Train with another model.rope.type to export"
        )
    base, _ = rope_parameters(replace(original(config), type="default"))
    return (base / inv_freq).tolist(), attention


def _refuse(config: RopeConfig) -> dict[str, Any]:
    advice = {
        "none": "export to an architecture without rotary positions",
        "dynamic_yarn": "fix the length: model.rope.type=yarn with model.rope.factor = that "
        "length / model.rope.original_len",
    }
    raise ConfigError(f"model.rope.type={config.type} has no form in transformers; {advice[config.type]}")


_EXPORTS: Mapping[str, Callable[[RopeConfig], dict[str, Any]]] = {
    "default": lambda config: _same_type(config),
    "none": _refuse,
    "linear": lambda config: _same_type(config, "factor"),
    "ntk": _export_ntk,
    "abf": _export_abf,
    "dynamic": lambda config: _same_type(config, "factor"),
    "yarn": _export_yarn,
    "dynamic_yarn": _refuse,
    "llama3": lambda config: _same_type(config, "factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": _export_longrope,
    "proportional": lambda config: _same_type(config, "factor"),
    "truncated": _export_vectors,
    "power": _export_vectors,
}
