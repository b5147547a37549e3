"""The table of known keys, taken from the schema, and what to say about a wrong one."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import units
from .schema import Config

_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of the configuration."""

    name: str
    """Dotted path such as `model.rope.theta`."""
    hint: Any
    """Type annotation."""
    unit: str | None
    """`tokens`, `bytes`, or none for a bare number."""
    default: Any
    """Value where no file sets one."""


@cache
def all_keys() -> dict[str, Key]:
    """Every key by its dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _walk(section: type[Any], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], f"{prefix}{field.name}.")
        else:
            unit = field.metadata.get("unit")
            name = f"{prefix}{field.name}"
            default = (
                field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            )
            yield Key(name=name, hint=hints[field.name], unit=unit, default=default)


def owner_of(name: str) -> str | None:
    """The key whose value is a mapping that holds `name`: `curriculum.weights` for one of its entries."""
    keys = all_keys()
    parts = name.split(".")
    owners = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((o for o in owners if o in keys and get_origin(keys[o].hint) is dict), None)


def off_word(key: Key) -> str | None:
    """The choice that YAML's `off` stands for, which it reads as false: `off`, or else `none`."""
    hints = get_args(key.hint) or (key.hint,)
    if bool in hints:
        return None
    choices = {
        choice for hint in (key.hint, *hints) if get_origin(hint) is Literal for choice in get_args(hint)
    }
    return next((word for word in ("off", "none") if word in choices), None)


def expected(key: Key) -> str:
    """What a key takes, in words: `an integer (8192, 8k or 1M) or auto`."""
    if get_origin(key.hint) is tuple:
        return f"a list, each {_words(get_args(key.hint)[0], key.unit)}"
    words = [_words(hint, key.unit) for hint in (get_args(key.hint) or (key.hint,))]
    if get_origin(key.hint) is Literal:
        words = [str(choice) for choice in get_args(key.hint)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(hint: Any, unit: str | None) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if hint is int and unit is not None:
        return f"{unit} as {units.EXAMPLES[unit]}"
    return _TYPE_WORDS.get(hint, str(hint))


def unknown_key(name: str, source: str) -> str:
    """The message for a key that does not exist, with the closest one that does."""
    known = list(all_keys())
    sections = {key.rpartition(".")[0] for key in known}
    if name in sections:
        return f"{name} ({source}) is a section; set one of its keys: {_keys_of(name)}"
    closest = max(known, key=lambda key: _similarity(name, key))
    if _similarity(name, closest) >= 0.6:
        return f"unknown key {name} ({source}); did you mean {closest}?"
    section = name.partition(".")[0]
    if section in sections:
        return f"unknown key {name} ({source}); {section} has: {_keys_of(section)}"
    top = sorted({key.partition(".")[0] for key in known})
    return f"unknown key {name} ({source}); the sections are {', '.join(top)}"


def _keys_of(section: str) -> str:
    return ", ".join(key.removeprefix(f"{section}.") for key in all_keys() if key.startswith(f"{section}."))


def _similarity(name: str, key: str) -> float:
    """Closeness of the whole paths, or, a little less, of the last words alone."""
    whole = SequenceMatcher(None, name, key).ratio()
    last = SequenceMatcher(None, name.rpartition(".")[2], key.rpartition(".")[2]).ratio()
    return max(whole, 0.9 * last)
