"""`longctx prepare FILE ...`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from parallel.errors import PlanError

from ..config.check import check_values
from ..config.load import load
from ..config.schema import Config, DataConfig
from ..errors import ConfigError, DataError
from .arguments import make_parser, parse

if TYPE_CHECKING:
    from ..data.outlook import Outlook
    from ..data.prepare import Prepared


def run(argv: Sequence[str]) -> int:
    """Make the tokenized store, or check the one that exists, and print what it holds."""
    parser = make_parser("prepare", "Turn documents into a tokenized store, resumable; print its lengths.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--ranks", type=int, default=8, help="data ranks of the predicted step (default 8)")
    arguments = parse(parser, argv)
    config = load(arguments.files, arguments.overrides).config
    check_values(config)
    rows = [_source(config, name, data, quiet=arguments.options.json) for name, data in _sources(config.data)]
    if arguments.options.json:
        print(json.dumps(rows[0] if not config.data.sources else {"sources": rows}))
    else:
        print(_forecast(config, arguments.options.ranks))
    return 0


def _forecast(config: Config, ranks: int) -> str:
    """Predicted step time with static and adaptive groups, or why there is none."""
    from .forecast import forecast, forecast_text

    try:
        return forecast_text(forecast(config, ranks))
    except (ConfigError, DataError, PlanError) as error:
        return f"no predicted step time for {ranks} data ranks: {error}"


def _sources(data: DataConfig) -> list[tuple[str, DataConfig]]:
    if not data.sources:
        return [(data.path, data)]
    return [(source.name, replace(data, path=source.path, sources=[])) for source in data.sources]


def _source(config: Config, name: str, data: DataConfig, *, quiet: bool) -> dict[str, Any]:
    """Prepare one source; say what it holds; its row of JSON."""
    from ..data.prepare import describe, prepare

    prepared = prepare(data, progress=not quiet)
    found = _outlook(config, data, prepared)
    if not quiet:
        print(describe(prepared, data.seq_len))
        if found is None:
            print(f"no curriculum at data.seq_len={data.seq_len:,}: it is no power of two")
        else:
            _say(name, prepared, found)
    return _row(prepared, found)


def _outlook(config: Config, data: DataConfig, prepared: "Prepared") -> "Outlook | None":
    """What a curriculum would make of the training documents; None where seq_len is no power of two."""
    from ..data.outlook import outlook
    from ..data.store import Store

    if data.seq_len & (data.seq_len - 1):
        return None
    lengths = Store(prepared.prefix).lengths[prepared.train_docs]
    return outlook(lengths, data, too_long=config.curriculum.too_long)


def _say(name: str, prepared: "Prepared", found: "Outlook") -> None:
    from pathlib import Path

    from ..data.outlook import outlook_text, write_plot
    from ..data.store import Store

    print(outlook_text(found, name))
    lengths = Store(prepared.prefix).lengths[prepared.train_docs]
    try:
        print(f"plot  {write_plot(Path(prepared.prefix + '.lengths.svg'), found, lengths)}")
    except OSError as error:
        print(f"no plot: {error}")


def _row(prepared: "Prepared", found: "Outlook | None") -> dict[str, Any]:
    from ..data.histogram import length_classes
    from ..data.store import Store

    row: dict[str, Any] = {
        "prefix": prepared.prefix,
        "train_documents": len(prepared.train_docs),
        "held_out_documents": len(prepared.held_out_docs),
        "tokens": prepared.num_tokens,
        "vocab_size": prepared.vocab_size,
        "skipped": prepared.num_skipped,
        "lengths": [asdict(each) for each in length_classes(Store(prepared.prefix).lengths)],
    }
    if found is not None:
        pieces = dict(zip(map(str, found.classes), found.pieces, strict=True))
        row |= {"pieces": pieces, "piece_tokens": found.kept, "attention_share": found.attention_share}
    return row
