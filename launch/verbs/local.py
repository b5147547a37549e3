"""`launch local --processes N [options] -- PROGRAM ...`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .. import local


def run(argv: Sequence[str], program: Sequence[str]) -> int:
    """Start the program on this machine; returns the exit code."""
    options = parser().parse_args(argv)
    if not program:
        parser().error("name the program after --, e.g. -- -m longctx train quickstart")
    if options.processes < 1:
        parser().error(f"--processes={options.processes}; choose at least 1")
    job = local.Job(
        argv=tuple(program),
        processes=options.processes,
        port=options.port,
        status=options.status,
        log=options.log,
    )
    if options.dry_run:
        print(shlex.join(local.dry_run(job)))
        return 0
    return local.run(job)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    verb = argparse.ArgumentParser(prog="launch local", usage=__doc__)
    verb.add_argument("--processes", type=int, required=True, help="workers to start")
    verb.add_argument("--port", type=int, default=0, help="port of the rendezvous; 0: any free one")
    verb.add_argument("--status", type=Path, help="file in which the program says how it ended")
    verb.add_argument("--log", type=Path, help="file for torchrun's own messages")
    verb.add_argument("--dry-run", action="store_true", help="print the torchrun command and stop")
    return verb
