"""Files and overrides become a typed `Config` that knows where each value comes from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from ..errors import ConfigError
from . import units
from .compose import CLONE_CONFIGS, Layer, covers, file_layers, override_layers
from .keys import Key, all_keys, expected, off_word, owner_of, unknown_key
from .schema import Config

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration as the user wrote it, before `check.resolve`."""

    config: Config
    """Typed values; `auto` still stands where it was written."""
    sources: Mapping[str, str]
    """Dotted key -> `default`, `file:PATH` or `command line`."""
    files: tuple[str, ...]
    """Files as named by the user."""
    overrides: tuple[str, ...]
    """Overrides as given by the user."""


def load(files: Sequence[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge defaults, files (later wins), fragments named on the command line, and overrides.

    Args:
        files: paths of YAML files, or names below `configs/`.
        overrides: `key=value`, `~key` (back to the default), `compose+=NAME`.

    Raises:
        ConfigError: a file, a key or a value is wrong; the message names the closest right one.
    """
    roots = [Path(), CLONE_CONFIGS, CLONE_CONFIGS / "recipes"]
    layers = [layer for name in files for layer in file_layers(name, roots)]
    values, sources = merge([*layers, *override_layers(overrides)])
    return LoadedConfig(
        config=typed(values, sources),
        sources={key: sources.get(key, DEFAULT) for key in all_keys()},
        files=tuple(files),
        overrides=tuple(overrides),
    )


def merge(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The last value of every key that is set, and the source that set it."""
    keys = all_keys()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for prefix in layer.deleted:
            if not any(covers(prefix, key) for key in keys):
                raise ConfigError(unknown_key(prefix, layer.source))
            values = {key: value for key, value in values.items() if not covers(prefix, key)}
        for key, raw in layer.values.items():
            if raw is None and any(covers(key, each) for each in keys if each != key):
                continue  # a section without keys
            owner = None if key in keys else owner_of(key)
            if owner is not None:  # one entry of a mapping
                before = values.get(owner)
                values[owner] = {**(before if isinstance(before, dict) else {}), key[len(owner) + 1 :]: raw}
                sources[owner] = layer.source
                continue
            if key not in keys:
                raise ConfigError(unknown_key(key, layer.source))
            values[key], sources[key] = _with_unit(keys[key], raw, layer.source), layer.source
    return values, {key: sources[key] for key in values}


def typed(values: Mapping[str, Any], sources: Mapping[str, str]) -> Config:
    """Check the type of every value and build the frozen dataclasses.

    Raises:
        ConfigError: naming key, value, source and the expected type.
    """
    nested = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(nested, key, value, force_add=True)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), nested)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_type_message(error, values, sources)) from error


def _refused(values: Mapping[str, Any]) -> str:
    """The first key whose value alone has the wrong type; empty: none."""
    for key, value in values.items():
        alone = OmegaConf.create()
        OmegaConf.update(alone, key, value, force_add=True)
        try:
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), alone))
        except OmegaConfBaseException:
            return key
    return ""


def _with_unit(key: Key, raw: Any, source: str) -> Any:
    if isinstance(raw, list) and key.unit is not None:
        return [_with_unit(key, each, source) for each in raw]
    if isinstance(raw, dict | list):
        return _text_keys(raw)
    if raw is False:
        return off_word(key) or raw
    if key.unit is None or not isinstance(raw, str) or raw == "auto" or "${" in raw:
        return raw
    try:
        return units.parse(raw, key.unit)
    except ValueError as error:
        raise ConfigError(f"{key.name}={raw} ({source}): {error}") from error


def _text_keys(raw: Any) -> Any:
    """Mappings below a value with their keys as text: YAML reads the length class 256 as a number."""
    if isinstance(raw, dict):
        return {str(key): _text_keys(value) for key, value in raw.items()}
    return [_text_keys(each) for each in raw] if isinstance(raw, list) else raw


def _type_message(
    error: OmegaConfBaseException, values: Mapping[str, Any], sources: Mapping[str, str]
) -> str:
    inner = (error.full_key or "").partition("[")[0]  # an entry of a list: the list
    # OmegaConf names no key for an entry of a list, and only the last word below a section in one.
    name = inner if inner in values else _refused(values)
    text = str(error.msg or error).splitlines()[0]
    if not name:
        return f"{inner}: {text}" if inner else text
    where = f"{name}={values[name]!r} ({sources[name]})"
    if inner not in ("", name):
        return f"{where}: {inner}: {text}"
    if isinstance(error, ConfigAttributeError) or "nterpolation" in type(error).__name__:
        return f"{where}: {text}"
    return f"{where}: expected {expected(all_keys()[name])}"
