"""`longctx verify FILE ...`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.load import load
from ..config.schema import Config
from ..protocol import STATUS
from .arguments import make_parser, parse
from .start import start, under_torchrun
from .worker import work

if TYPE_CHECKING:
    from ..build import World


def run(argv: Sequence[str]) -> int:
    """Compare one batch in the chosen layout with one process; 0 equal, 1 not."""
    parser = make_parser(
        "verify", "Loss, logits and every gradient of one batch: one process against the layout."
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="compute type")
    arguments = parse(parser, argv)
    dtype = arguments.options.dtype
    loaded = load(arguments.files, (*arguments.overrides, f"train.dtype={dtype}"))
    folder = Path(loaded.config.run.dir, "verify")
    if under_torchrun():
        return work(loaded, _body, status=folder / STATUS)
    start(
        "verify", replace(loaded, overrides=arguments.overrides), folder=folder, options=[f"--dtype={dtype}"]
    )


def _body(config: Config, world: "World") -> int:
    from ..train.verify import verify  # torch: only where a worker needs it

    return verify(config, world)
