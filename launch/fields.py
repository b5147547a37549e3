"""Mappings from YAML become frozen dataclasses; an unknown key or a wrong value is named."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from . import units
from .errors import SpecError

T = TypeVar("T")
Scalar = str | int | float | bool | None


def build(kind: type[T], raw: object, *, where: str, prefix: str = "") -> T:
    """A dataclass from a mapping.

    Args:
        kind: the dataclass.
        raw: what stands in the file.
        where: the file, for messages.
        prefix: dotted path of `raw` in the file.

    Raises:
        SpecError: an unknown or missing key or a value of the wrong type, with what would be right.
    """
    if not isinstance(raw, Mapping):
        raise SpecError(f"{where}: {prefix or 'the file'} must be a mapping of keys, not {raw!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in known:
            raise SpecError(f"{where}: {unknown(_join(prefix, str(key)), [_join(prefix, k) for k in known])}")
    values = {
        key: _value(hints[key], each, known[key].metadata, (where, _join(prefix, key)))
        for key, each in raw.items()
    }
    missing = [key for key, field in known.items() if key not in values and _required(field)]
    if missing:
        raise SpecError(f"{where}: {_join(prefix, missing[0])} is missing; add it")
    return kind(**values)


def unknown(key: str, keys: typing.Iterable[str]) -> str:
    """What to say about a key that nobody reads."""
    keys = sorted(keys)
    close = get_close_matches(key, keys, n=1)
    return f"unknown key {key}; " + (
        f"did you mean {close[0]}?" if close else f"the keys are {', '.join(keys)}"
    )


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _value(hint: Any, raw: Any, metadata: Mapping[str, Any], at: tuple[str, str]) -> Any:
    """One value, converted to the type of its field."""
    if "unit" in metadata:
        try:
            return units.parse(raw, metadata["unit"])
        except ValueError as error:
            raise SpecError(f"{at[0]}: {at[1]}: {error}") from error
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), raw, where=at[0], prefix=at[1])
    if origin is tuple:
        return _tuple(arguments[0], raw, at)
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return _mapping(arguments[1], raw, at)
    if origin is typing.Literal:
        return _choice(arguments, raw, at)
    return _scalar(arguments if origin in (typing.Union, types.UnionType) else (hint,), raw, at)


def _tuple(hint: Any, raw: Any, at: tuple[str, str]) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple):
        raise SpecError(f"{at[0]}: {at[1]}={raw!r} must be a list")
    return tuple(_value(hint, each, {}, (at[0], f"{at[1]}[{i}]")) for i, each in enumerate(raw))


def _mapping(hint: Any, raw: Any, at: tuple[str, str]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise SpecError(f"{at[0]}: {at[1]}={raw!r} must be a mapping of keys")
    return {str(key): _value(hint, each, {}, (at[0], f"{at[1]}.{key}")) for key, each in raw.items()}


def _choice(choices: tuple[Any, ...], raw: Any, at: tuple[str, str]) -> Any:
    if raw is False:
        raw = next((word for word in ("none", "never") if word in choices), raw)  # YAML reads `off` so
    if raw not in choices:
        raise SpecError(f"{at[0]}: {at[1]}={raw!r}; choose one of {', '.join(map(str, choices))}")
    return raw


def _scalar(kinds: tuple[type, ...], raw: Any, at: tuple[str, str]) -> Any:
    if type(raw) in kinds:
        return raw
    if float in kinds and type(raw) is int:
        return float(raw)
    if kinds == (str,) and type(raw) in (int, float):
        return str(raw)
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise SpecError(f"{at[0]}: {at[1]}={raw!r} must be {names}")
