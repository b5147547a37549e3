"""Command lines of verbs that name folders, not configuration files."""

import argparse
from pathlib import Path


def make_words_parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser without abbreviations; the verb adds what it takes."""
    return argparse.ArgumentParser(
        prog=f"longctx {verb}",
        description=description,
        usage=f"longctx {verb} {usage}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def new_folder(text: str) -> Path:
    """The value of an argument that names a folder to write."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; name a local folder, and upload that")
    return Path(text).expanduser()


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every verb has."""
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
