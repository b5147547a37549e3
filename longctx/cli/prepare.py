"""`longctx prepare FILE ...`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from ..config.check import check_values
from ..config.load import load
from .arguments import make_parser, parse


def run(argv: Sequence[str]) -> int:
    """Make the tokenized store, or check the one that exists, and print what it holds."""
    parser = make_parser("prepare", "Turn documents into a tokenized store, resumable; print its lengths.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parse(parser, argv)
    config = load(arguments.files, arguments.overrides).config
    check_values(config)
    from ..data.histogram import length_classes
    from ..data.prepare import describe, prepare
    from ..data.store import Store

    prepared = prepare(config.data, progress=not arguments.options.json)
    if not arguments.options.json:
        print(describe(prepared, config.data.seq_len))
        return 0
    classes = length_classes(Store(prepared.prefix).lengths)
    row = {
        "prefix": prepared.prefix,
        "train_documents": len(prepared.train_docs),
        "held_out_documents": len(prepared.held_out_docs),
        "tokens": prepared.num_tokens,
        "vocab_size": prepared.vocab_size,
        "skipped": prepared.num_skipped,
        "lengths": [asdict(each) for each in classes],
    }
    print(json.dumps(row))
    return 0
