"""Which keys of `RopeConfig` each method reads, and the check that no other is set. No torch here.

A method's formula is registered under the same name in `frequencies`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from ..config.schema import RopeConfig
from ..errors import ConfigError

COMMON = frozenset({"type", "theta", "head_dim"})
"""Keys that every method reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys of one method besides the common ones."""

    required: frozenset[str] = frozenset()
    """Keys without a usable default."""
    optional: frozenset[str] = frozenset()
    """Keys that may stay at their default."""


METHOD_KEYS: Mapping[str, Keys] = {
    "default": Keys(),
    "linear": Keys(required=frozenset({"factor"})),
    "llama3": Keys(
        required=frozenset({"factor", "original_len"}),
        optional=frozenset({"low_freq_factor", "high_freq_factor"}),
    ),
}


def with_head_dim(config: RopeConfig, head_dim: int) -> RopeConfig:
    """`config` for heads of `head_dim` dims, which it may leave open (0).

    Raises:
        ConfigError: it names another number of dims.
    """
    if config.head_dim not in (0, head_dim):
        raise ConfigError(
            f"rope.head_dim={config.head_dim} differs from model.head_dim={head_dim}; "
            "remove rope.head_dim, every dim of a head is rotated"
        )
    return replace(config, head_dim=head_dim)


def check_rope(config: RopeConfig) -> None:
    """Refuse a method that does not exist, keys that it does not read, and values it cannot use.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    keys = METHOD_KEYS.get(config.type)
    if keys is None:
        close = get_close_matches(config.type, METHOD_KEYS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"rope.type={config.type!r} is unknown; {hint}Choose one of {_names(METHOD_KEYS)}")
    _check_strays(config, keys)
    for name in sorted(keys.required):
        if getattr(config, name) is None:
            raise ConfigError(f"rope.type={config.type} needs rope.{name}, which is not set; set it")
    _check_values(config)


def _check_strays(config: RopeConfig, keys: Keys) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in COMMON | keys.required | keys.optional:
            continue
        readers = [name for name, k in METHOD_KEYS.items() if field.name in k.required | k.optional]
        raise ConfigError(
            f"rope.{field.name}={value} does not belong to rope.type={config.type}; "
            f"remove it, or set rope.type to {_names(readers)}"
        )


def _check_values(config: RopeConfig) -> None:
    if config.head_dim < 2 or config.head_dim % 2:
        raise ConfigError(f"rope.head_dim={config.head_dim} must be even and at least 2: dims turn in pairs")
    if not config.theta > 1.0:
        raise ConfigError(f"rope.theta={config.theta} must exceed 1; usual bases are 10000 to 100000000")
    if not config.factor >= 1.0:
        raise ConfigError(f"rope.factor={config.factor} = target / original length; set it to at least 1")
    if config.original_len is not None and config.original_len < 1:
        raise ConfigError(f"rope.original_len={config.original_len} tokens; set the length before extension")
    if not 0.0 < config.low_freq_factor < config.high_freq_factor:
        raise ConfigError(
            f"rope.low_freq_factor={config.low_freq_factor} must be positive and below "
            f"rope.high_freq_factor={config.high_freq_factor}; Llama 3 uses 1 and 4"
        )


def _names(names: Mapping[str, Keys] | list[str]) -> str:
    return ", ".join(sorted(names))
