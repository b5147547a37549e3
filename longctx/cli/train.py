"""`longctx train FILE ...`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..claim import check_traces, check_unused, enter
from ..config.load import load
from ..config.schema import Config
from ..protocol import STATUS
from .arguments import make_parser, parse
from .start import start, under_torchrun
from .supervise import become_supervisor, repairs
from .worker import work

if TYPE_CHECKING:
    from ..build import World


def run(argv: Sequence[str]) -> int:
    """Train: as one rank under torchrun, otherwise by starting local processes."""
    parser = make_parser(
        "train", "Train a model. Under torchrun: one rank. Alone: starts all local processes."
    )
    arguments = parse(parser, argv)
    loaded = load(arguments.files, arguments.overrides)
    folder = Path(loaded.config.run.dir)
    if under_torchrun():
        if repairs(loaded.config):
            become_supervisor(loaded)
        with enter(folder, os.environ):
            return work(loaded, _body, status=folder / STATUS)
    check_unused(folder, resume=loaded.config.run.resume)
    start("train", loaded, folder=folder)


def _body(config: Config, world: "World") -> int:
    from ..recovery.members import Fixed  # torch: only where a worker needs it
    from ..train.loop import train

    if world.rank == 0:
        check_traces(Path(config.run.dir), resume=config.run.resume)
    return train(config, Fixed(world))
