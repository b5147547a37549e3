"""`longctx train FILE ...`."""

from collections.abc import Sequence
from pathlib import Path

from ..config.load import load
from .arguments import make_parser, parse
from .folder import STATUS, check_unused
from .start import start, under_torchrun


def run(argv: Sequence[str]) -> int:
    """Train: as one rank under torchrun, otherwise by starting local processes."""
    parser = make_parser(
        "train", "Train a model. Under torchrun: one rank. Alone: starts all local processes."
    )
    arguments = parse(parser, argv)
    loaded = load(arguments.files, arguments.overrides)
    folder = Path(loaded.config.run.dir)
    if under_torchrun():
        from ..train.loop import train
        from .worker import work

        return work(loaded, train, status=folder / STATUS)
    check_unused(folder, resume=loaded.config.run.resume)
    start("train", loaded, folder=folder)
