"""Command lines of the form `FILE ... key=value ... ~key ... --option`, in any order."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

_OVERRIDE = re.compile(r"~|[A-Za-z_][\w.]*\+?=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """A parsed command line."""

    files: tuple[str, ...]
    """Configuration files."""
    overrides: tuple[str, ...]
    """`key=value`, `~key` and `compose+=NAME`."""
    options: argparse.Namespace
    """The verb's own options."""


def make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser that only knows `--help`; the verb adds its options."""
    parser = argparse.ArgumentParser(
        prog=f"longctx {verb}",
        description=description,
        usage=f"longctx {verb} FILE ... [key=value ...] [~key ...] [options]",
        allow_abbrev=False,
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Arguments:
    """Split a command line; a verb needs at least one FILE."""
    options, words = parser.parse_known_args(list(argv))
    strangers = [word for word in words if word.startswith("-")]
    if strangers:
        parser.error(f"unknown option {strangers[0]}")
    overrides = tuple(word for word in words if _OVERRIDE.match(word))
    files = tuple(word for word in words if not _OVERRIDE.match(word))
    if not files:
        parser.error("name a configuration FILE, for example quickstart")
    return Arguments(files=files, overrides=overrides, options=options)
