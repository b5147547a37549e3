"""`longctx export SOURCE TARGET`."""

import json
from collections.abc import Sequence

from ..config.units import parse
from ..errors import ConfigError
from ..protocol import DONE
from .words import add_json, make_words_parser, new_folder


def run(argv: Sequence[str]) -> int:
    """Write a folder that transformers and vLLM load; 1 if `--verify` finds a difference."""
    parser = make_words_parser(
        "export",
        "SOURCE TARGET [--dtype TYPE] [--max-shard SIZE] [--verify] [--json]",
        "Write a Hugging Face folder. SOURCE: a run folder (its newest good one), a checkpoint, an import.",
    )
    parser.add_argument("source", help="run folder, checkpoint or imported folder")
    parser.add_argument("target", type=new_folder, help="new folder")
    parser.add_argument("--dtype", default="auto", help="auto: the imported model's, or as stored")
    parser.add_argument("--max-shard", default="5GiB", help="largest weight file (default 5GiB)")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers")
    add_json(parser)
    options = parser.parse_args(list(argv))
    from ..hf.exporting import export_hf
    from ..hf.source import open_source

    source = open_source(options.source)
    written = export_hf(
        source, options.target, dtype=options.dtype, max_shard_bytes=_bytes(options.max_shard)
    )
    row = {"path": str(written.path), "bytes": written.num_bytes, "files": written.num_files}
    row |= {"dtype": written.dtype, "step": source.step}
    code = DONE
    if options.verify:
        from .comparing import compared

        code, figures = compared(source.where, written.path)
        row |= figures
    size = f"{written.num_bytes / 2**30:.2f} GiB in {written.dtype}, {written.num_files} files"
    print(json.dumps(row) if options.json else f"{written.path}: {size}, from {source.where}")
    return code


def _bytes(text: str) -> int:
    try:
        size = int(parse(text, "bytes"))
    except ValueError as error:
        raise ConfigError(f"--max-shard {text}: {error}") from error
    if size < 1:
        raise ConfigError(f"--max-shard {text}; choose at least 1 byte, for example 5GiB")
    return size
