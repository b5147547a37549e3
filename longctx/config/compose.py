"""From files and command line to layers of raw values: later layers win.

A file lists the fragments it stands on, then its own keys:

    compose: [model/tiny, data/python-stdlib]
    train: {steps: 100}

A fragment is a file of the same form, named by its path below `configs/` without `.yaml`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError

COMPOSE = "compose"
COMMAND_LINE = "command line"
CLONE_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Values that one source sets, and keys that it takes back."""

    source: str
    """`file:PATH` or `command line`."""
    values: Mapping[str, Any]
    """Dotted key -> raw value."""
    deleted: tuple[str, ...] = ()
    """Keys or sections that fall back to their defaults."""


def file_layers(name: str, roots: Sequence[Path], parents: tuple[Path, ...] = ()) -> Iterator[Layer]:
    """The layers of a file: its fragments in the order of `compose`, then its own keys.

    Args:
        name: path, or name below one of `roots`, with or without `.yaml`.
        roots: folders that are searched for the name, first wins.
        parents: files that are being composed; naming one of them again is an error.
    """
    path = find_file(name, roots)
    if path.resolve() in parents:
        raise ConfigError(f"{path} composes itself; remove it from the {COMPOSE} list of {parents[-1]}")
    content = read_mapping(path)
    fragments = content.pop(COMPOSE, None) or []
    if not isinstance(fragments, list) or not all(isinstance(each, str) for each in fragments):
        raise ConfigError(f"{path}: {COMPOSE} is {fragments!r}; write a list of names such as [model/tiny]")
    for each in fragments:
        yield from file_layers(each, search_roots(path), (*parents, path.resolve()))
    yield Layer(source=f"file:{path}", values=dict(flatten(content)))


def override_layers(overrides: Sequence[str]) -> Iterator[Layer]:
    """The layers of `key=value`, `~key` and `compose+=NAME`, fragments first."""
    values: dict[str, Any] = {}
    deleted: list[str] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if item.startswith("~"):
            deleted.append(item[1:])
            values = {each: value for each, value in values.items() if not covers(item[1:], each)}
        elif not equals or not key:
            raise ConfigError(f"{item!r} is no override; write key=value, ~key or {COMPOSE}+=NAME")
        elif key == f"{COMPOSE}+":
            for name in text.split(","):
                yield from file_layers(name.strip(), [Path(), CLONE_CONFIGS])
        else:
            values[key] = parse_value(key, text)
    yield Layer(source=COMMAND_LINE, values=values, deleted=tuple(deleted))


def covers(prefix: str, key: str) -> bool:
    """Whether `prefix` is `key` or a section that holds it."""
    return key == prefix or key.startswith(f"{prefix}.")


def search_roots(path: Path) -> list[Path]:
    """Where the fragments of a file are: its own `configs` folder, beside it, then the clone's."""
    resolved = path.resolve()
    own = [parent for parent in resolved.parents if parent.name == "configs"]
    return [*own[:1], resolved.parent, CLONE_CONFIGS]


def find_file(name: str, roots: Sequence[Path]) -> Path:
    """The first file called `name` or `name.yaml` below the roots; an absolute name is taken as is."""
    for root in roots:
        for candidate in _spellings(name):
            if (root / candidate).is_file():
                return shorten(root / candidate)
    raise ConfigError(_not_found(name, roots))


def _spellings(name: str) -> tuple[str, ...]:
    return (name,) if name.endswith((".yaml", ".yml")) else (name, f"{name}.yaml")


def shorten(path: Path) -> Path:
    """The path relative to the working folder where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path


def _not_found(name: str, roots: Sequence[Path]) -> str:
    from difflib import get_close_matches

    known = {
        str(found.relative_to(root).with_suffix(""))
        for root in roots
        if root.name == "configs" and root.is_dir()
        for found in root.rglob("*.yaml")
    }
    close = get_close_matches(name.removesuffix(".yaml"), sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    where = ", ".join(dict.fromkeys(str(shorten(root)) for root in roots))
    return f"no configuration file {' or '.join(_spellings(name))} in {where}{hint}"


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML file as plain nested dicts, interpolations left as text."""
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} holds a list; a configuration file is a mapping of sections")
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, value); an empty section sets nothing."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def parse_value(key: str, text: str) -> Any:
    """The value of a command line override, read as YAML would read it."""
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}={text}: the value is not valid YAML; quote it") from error
    plain = OmegaConf.to_container(parsed, resolve=False)
    assert isinstance(plain, dict)
    return plain["value"]
