"""`python -m launch local --processes N [options] -- PROGRAM ...`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import local


def main(argv: Sequence[str]) -> int:
    """Parse and run one verb; returns the exit code."""
    own, program = split(argv)
    options = parser().parse_args(own)
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


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`."""
    arguments = list(argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="launch", description="Start programs on machines.")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("local", help="on this machine, under torchrun", usage=__doc__)
    verb.add_argument("--processes", type=int, required=True, help="workers to start")
    verb.add_argument("--port", type=int, default=0, help="port of the rendezvous; 0: any free one")
    verb.add_argument("--status", type=Path, help="file in which the program says how it ended")
    verb.add_argument("--log", type=Path, help="file for torchrun's own messages")
    verb.add_argument("--dry-run", action="store_true", help="print the torchrun command and stop")
    return top


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
