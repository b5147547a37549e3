"""`longctx import SOURCE TARGET`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from ..protocol import DONE, FAILED
from .words import add_json, make_words_parser

if TYPE_CHECKING:
    from ..hf.importing import Imported


def run(argv: Sequence[str]) -> int:
    """Write weights of others as a checkpoint of ours; 1 if `--verify` finds a difference."""
    parser = make_words_parser(
        "import",
        "SOURCE TARGET [--add-tokens FILE] [--verify] [--json]",
        "Make weights to train from. SOURCE: a Hugging Face folder, a hub id or a hub cache entry.",
    )
    parser.add_argument("source", help="model folder, or a hub id that is on this disk")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--add-tokens", type=Path, metavar="FILE", help="text file with a new token per line")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers")
    add_json(parser)
    options = parser.parse_args(list(argv))
    try:
        imported, found = _import(options.source, options.target, options.add_tokens)
    except CheckpointError as error:  # what is damaged is the user's input
        raise ConfigError(str(error)) from error
    row = {"path": str(imported.path), "bytes": imported.num_bytes}
    code = DONE
    if options.verify:
        from .comparing import compared

        code, figures = compared(str(imported.path), found)
        row |= figures
    if options.json:
        print(json.dumps(row))
    else:
        from ..hf.importing import FRAGMENT

        print(f"{imported.num_bytes / 2**30:.2f} GiB of weights in {imported.path}; train on from them with")
        print(f"  longctx train quickstart {imported.path / FRAGMENT} data.path=...")
    return code if code == DONE else FAILED


def _import(source: str, target: Path, tokens: Path | None) -> tuple["Imported", Path]:
    from ..hf.folder import find_folder, open_hf
    from ..hf.importing import import_hf

    folder = find_folder(source)
    return import_hf(open_hf(folder), target, tokens=tokens), folder
