"""`python -m launch.supervise`: what a rank of torchrun becomes when lost ranks are to be replaced.

The first process of a node supervises its trainers; the others wait for its verdict.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .membership import Limits
from .place import place
from .supervisor import FORWARDED, Settings, Supervisor
from .verdict import wait_for_verdict


def main(argv: Sequence[str]) -> int:
    """Supervise or wait; returns the job's exit code."""
    if os.environ["LOCAL_RANK"] != "0":
        return wait_for_verdict(FORWARDED)
    at = list(argv).index("--")
    options = _parser().parse_args(argv[:at])
    settings = Settings(
        program=tuple(argv[at + 1 :]),
        folder=options.folder,
        spares=options.spares,
        heartbeat_s=options.heartbeat_s,
        limits=Limits(failures=options.max_failures, hang_s=options.hang_s),
    )
    return Supervisor(place(dict(os.environ)), settings).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.supervise", usage="%(prog)s [options] -- PROGRAM ...")
    parser.add_argument("--folder", type=Path, required=True, help="run folder, shared by all nodes")
    parser.add_argument("--spares", type=int, default=1, help="idle processes of this node")
    parser.add_argument("--heartbeat-s", type=float, default=10.0, help="silence that ends a trainer")
    parser.add_argument("--hang-s", type=float, default=600.0, help="seconds without any progress")
    parser.add_argument("--max-failures", type=int, default=3, help="losses of a rank without a new step")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
