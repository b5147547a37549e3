"""Values inside shell scripts: quoted, and never a credential."""

import re
from collections.abc import Iterable, Mapping

from .errors import SpecError

_CREDENTIAL = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+-]+")
"""What needs no quotes, also not for shellcheck, which takes a comma in an array for a mistake."""
_KEYWORDS = frozenset(
    "if then elif else fi for while until do done case esac in select function time coproc".split()
)
"""Plain words that a reader of shell, and shellcheck, would take for its own."""
SHORTEST = 8
"""Letters from which on a value counts as a credential; shorter ones stand in any text."""


def quote(text: str, what: str = "a value") -> str:
    """One shell word.

    Raises:
        SpecError: a NUL byte, which no argument can hold.
    """
    if "\0" in text:
        raise SpecError(f"{what} {text!r} holds a NUL byte; no program can be given that")
    plain = _PLAIN.fullmatch(text) and text not in _KEYWORDS
    return text if plain else "'" + text.replace("'", "'\"'\"'") + "'"


def words(values: Iterable[str]) -> str:
    """Several shell words."""
    return " ".join(quote(value) for value in values)


def exports(env: Mapping[str, str | None]) -> list[str]:
    """`export` and `unset` lines.

    Raises:
        SpecError: a name that is none, or one that looks like a credential.
    """
    lines = []
    for name, value in sorted(env.items()):
        check_name(name)
        if value is not None and _CREDENTIAL.search(name):
            raise SpecError(
                f"env.{name} looks like a credential, and scripts are kept for all to read; put the value "
                f"in a file that only you can read and set secrets.{name} to its path, or export {name} "
                "before you submit"
            )
        lines.append(f"unset {name}" if value is None else f"export {name}={quote(value, f'env.{name}')}")
    return lines


def secrets(files: Mapping[str, str]) -> list[str]:
    """Lines that read each variable from its file when the job starts."""
    lines = []
    for name, path in sorted(files.items()):
        check_name(name)
        word = quote(path, f"secrets.{name}")
        lines += [f"{name}=$(cat -- {word}) || exit 2", f"export {name}"]
    return lines


def check_name(name: str) -> None:
    """Refuse what is no name of an environment variable."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"env: {name!r} is no name of a variable; use letters, digits and _")


def check_no_credential(text: str, environ: Mapping[str, str]) -> None:
    """Refuse a script that holds the value of a credential of the person who submits.

    Raises:
        SpecError: naming the variable, not its value.
    """
    for name, value in environ.items():
        if _CREDENTIAL.search(name) and len(value) >= SHORTEST and value in text:
            raise SpecError(
                f"the rendered script would hold the value of {name}; pass it by name: "
                f"secrets.{name}=FILE, or leave it in your environment"
            )
