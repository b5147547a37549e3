"""Which keys of `RopeConfig` each method reads, and the check that no other is set. No torch here.

A method's formula is registered under the same name in `longctx.rope.frequencies`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from ..errors import ConfigError
from .schema import RopeConfig

COMMON = frozenset({"type", "theta", "head_dim", "partial_rotary_factor", "none_layers"})
"""Keys that every method reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys of one method besides the common ones."""

    required: frozenset[str] = frozenset()
    """Keys without a usable default."""
    optional: frozenset[str] = frozenset()
    """Keys that may stay at their default."""

    @property
    def all(self) -> frozenset[str]:
        """Every key."""
        return self.required | self.optional


def _keys(required: str = "", optional: str = "") -> Keys:
    return Keys(required=frozenset(required.split()), optional=frozenset(optional.split()))


_YARN = "attention_factor beta_fast beta_slow truncate mscale mscale_all_dim"

METHOD_KEYS: Mapping[str, Keys] = {
    "default": _keys(),
    "none": _keys(),
    "linear": _keys("factor", "original_len target_len mixed_window"),
    "ntk": _keys("factor", "original_len target_len mixed_window"),
    "abf": _keys("", "extended_theta original_len target_len mixed_window"),
    "dynamic": _keys("factor original_len", "target_len"),
    "yarn": _keys("factor original_len", f"target_len mixed_window {_YARN}"),
    "dynamic_yarn": _keys("original_len", _YARN),
    "llama3": _keys("factor original_len", "target_len mixed_window low_freq_factor high_freq_factor"),
    "longrope": _keys("original_len short_factor long_factor", "factor target_len attention_factor"),
    "proportional": _keys("", "factor original_len target_len mixed_window"),
    "truncated": _keys("original_len", "low_ratio zero_ratio mixed_window"),
    "power": _keys("power", "original_len mixed_window"),
}


def with_head_dim(config: RopeConfig, head_dim: int) -> RopeConfig:
    """`config` for heads of `head_dim` dims, which it may leave open (0).

    Raises:
        ConfigError: it names another number of dims.
    """
    if config.head_dim not in (0, head_dim):
        raise ConfigError(
            f"model.rope.head_dim={config.head_dim} differs from model.head_dim={head_dim}; remove "
            "model.rope.head_dim, or set model.rope.partial_rotary_factor to turn only some dims of a head"
        )
    return replace(config, head_dim=head_dim)


def rotary_dim(config: RopeConfig) -> int:
    """Dims of a head that have an entry in the frequencies, two for each."""
    if config.type == "proportional":
        return config.head_dim
    return int(config.head_dim * config.partial_rotary_factor)


def extension_factor(config: RopeConfig) -> float:
    """`factor`, or target / original length where a target is given."""
    if config.target_len is None or config.original_len is None:
        return config.factor
    return config.target_len / config.original_len


def check_rope(config: RopeConfig) -> None:
    """Refuse a method that does not exist, keys that it does not read, and values it cannot use.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    keys = METHOD_KEYS.get(config.type)
    if keys is None:
        close = get_close_matches(config.type, METHOD_KEYS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"model.rope.type={config.type!r} is unknown; {hint}Choose one of {_names(METHOD_KEYS)}"
        )
    _check_strays(config, keys)
    for name in sorted(keys.required):
        if getattr(config, name) in (None, ()):
            raise ConfigError(
                f"model.rope.type={config.type} needs model.rope.{name}, which is not set; set it"
            )
    _check_dims(config)
    _check_lengths(config)
    _check_values(config)
    for name in ("short_factor", "long_factor"):
        _check_vector(config, name)


def _check_strays(config: RopeConfig, keys: Keys) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in COMMON | keys.all:
            continue
        readers = [name for name, k in METHOD_KEYS.items() if field.name in k.all]
        raise ConfigError(
            f"model.rope.{field.name}={value} does not belong to model.rope.type={config.type}; "
            f"remove it, or set model.rope.type to {_names(readers)}"
        )


def _check_dims(config: RopeConfig) -> None:
    if config.head_dim < 2 or config.head_dim % 2:
        raise ConfigError(
            f"model.rope.head_dim={config.head_dim} must be even and at least 2: dims turn in pairs"
        )
    share = config.partial_rotary_factor
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"model.rope.partial_rotary_factor={share} is a share of a head; choose above 0 up to 1"
        )
    turning = int(config.head_dim * share)
    if config.type != "proportional" and (turning < 2 or turning % 2):
        raise ConfigError(
            f"model.rope.partial_rotary_factor={share} turns {turning} of "
            f"model.rope.head_dim={config.head_dim} dims, "
            "but dims turn in pairs; choose a share that makes an even number of at least 2"
        )
    wrong = [layer for layer in config.none_layers if layer < 0]
    if wrong:
        raise ConfigError(f"model.rope.none_layers has {wrong[0]}; layers count from 0")


def _check_lengths(config: RopeConfig) -> None:
    original, target = config.original_len, config.target_len
    if not config.factor >= 1.0:
        raise ConfigError(
            f"model.rope.factor={config.factor} = target / original length; set it to at least 1"
        )
    if original is not None and original < 1:
        raise ConfigError(f"model.rope.original_len={original} tokens; set the length before extension")
    if config.mixed_window and original is None:
        raise ConfigError(
            "model.rope.mixed_window needs model.rope.original_len, the longest document left as it was"
        )
    if target is None:
        return
    if original is None:
        raise ConfigError(
            f"model.rope.target_len={target} needs model.rope.original_len, the length before extension"
        )
    if target < original:
        raise ConfigError(
            f"model.rope.target_len={target} is shorter than "
            f"model.rope.original_len={original}; set it to at least "
            f"{original}, or use model.rope.type=default for a shorter context"
        )
    if config.factor not in (1.0, target / original):
        raise ConfigError(
            f"model.rope.factor={config.factor} contradicts model.rope.target_len={target} "
            f"/ model.rope.original_len={original}"
            f" = {target / original}; remove one of them"
        )


def _check_values(config: RopeConfig) -> None:
    if not config.theta > 1.0:
        raise ConfigError(
            f"model.rope.theta={config.theta} must exceed 1; usual bases are 10000 to 100000000"
        )
    for low, high, usual in (
        ("low_freq_factor", "high_freq_factor", "Llama 3 uses 1 and 4"),
        ("beta_slow", "beta_fast", "YaRN uses 1 and 32"),
    ):
        if not 0.0 < getattr(config, low) < getattr(config, high):
            raise ConfigError(
                f"model.rope.{low}={getattr(config, low)} must be positive and below "
                f"model.rope.{high}={getattr(config, high)}; {usual}"
            )
    for name in ("attention_factor", "mscale", "mscale_all_dim", "low_ratio", "zero_ratio"):
        value = getattr(config, name)
        if value is not None and not value > 0.0:
            raise ConfigError(f"model.rope.{name}={value} must be positive")
    if not config.power >= 0.0:
        raise ConfigError(f"model.rope.power={config.power} must be at least 0, which changes nothing")
    if (config.mscale is None) != (config.mscale_all_dim is None):
        raise ConfigError(
            "model.rope.mscale and model.rope.mscale_all_dim work as a pair; set both or neither"
        )
    if config.type == "abf":
        _check_base(config)


def _check_base(config: RopeConfig) -> None:
    if config.extended_theta is None and config.target_len is None:
        raise ConfigError(
            "model.rope.type=abf needs model.rope.extended_theta, the new base, or "
            "model.rope.original_len and "
            "model.rope.target_len to take it from the scaling law"
        )
    if config.extended_theta is not None and not config.extended_theta >= config.theta:
        raise ConfigError(
            f"model.rope.extended_theta={config.extended_theta} is below "
            f"model.rope.theta={config.theta}; a longer "
            "context needs a larger base"
        )


def _check_vector(config: RopeConfig, name: str) -> None:
    values, pairs = getattr(config, name), rotary_dim(config) // 2
    if not values:
        return
    if len(values) != pairs:
        raise ConfigError(
            f"model.rope.{name} has {len(values)} values, but {rotary_dim(config)} rotary "
            f"dims make {pairs} pairs; "
            f"give {pairs} values, fastest pair first"
        )
    wrong = [value for value in values if not 0.0 < value < float("inf")]
    if wrong:
        raise ConfigError(
            f"model.rope.{name} holds {wrong[0]}; every value divides a frequency and is positive"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
