"""`longctx import SOURCE TARGET`."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from ..protocol import DONE, FAILED
from .words import add_json, make_words_parser, new_folder

if TYPE_CHECKING:
    from ..hf.importing import Imported


def run(argv: Sequence[str]) -> int:
    """Write weights of others as a checkpoint of ours; 1 if `--verify` finds a difference."""
    parser = make_words_parser(
        "import",
        "SOURCE TARGET [--add-tokens FILE] [--verify] [--model FILE] [--json]",
        "Make weights to train from. SOURCE: a Hugging Face folder, a hub id or a hub cache entry; or, with\n"
        "--model, a Megatron-core distributed checkpoint of a GPT model.",
    )
    parser.add_argument("source", help="model folder, or a hub id that is on this disk")
    parser.add_argument("target", type=new_folder, help="new folder")
    parser.add_argument("--model", metavar="FILE", help="Megatron-core: configuration with the model section")
    parser.add_argument("--add-tokens", type=Path, metavar="FILE", help="text file with a new token per line")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers")
    add_json(parser)
    options = parser.parse_args(list(argv))
    try:
        imported, found = _import(options)
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


def _import(options: Namespace) -> tuple["Imported", Path]:
    from ..hf.folder import find_folder, open_hf
    from ..hf.importing import import_hf
    from ..megatron.reader import find_iteration

    megatron = find_iteration(Path(options.source).expanduser())
    if megatron is None:
        if options.model is not None:
            raise ConfigError(f"--model is for Megatron-core checkpoints; {options.source} has no .metadata")
        folder = find_folder(options.source)
        return import_hf(open_hf(folder), options.target, tokens=options.add_tokens), folder
    if options.model is None or options.verify or options.add_tokens:
        raise ConfigError(
            f"{options.source} is a Megatron-core checkpoint: it needs --model FILE with its model section "
            "(such as model/llama3-8b), and neither --verify nor --add-tokens works with it"
        )
    from ..config.load import load
    from ..megatron.importing import import_megatron

    return import_megatron(megatron, load([options.model]).config.model, options.target), megatron
