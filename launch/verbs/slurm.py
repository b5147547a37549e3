"""`launch slurm [--job FILE] [--site FILE] [options] -- PROGRAM ...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import check, directives, submit
from ..load import Loaded, load
from ..local import say
from ..protocol import DONE
from ..quote import quote
from ..slurm import render


def add_spec(parser: argparse.ArgumentParser) -> None:
    """The options that every backend shares."""
    parser.add_argument("--job", default="", metavar="FILE", help="job file; without it the defaults")
    parser.add_argument("--site", default="", metavar="FILE", help="site file, or a name in configs/cluster")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of either")
    parser.add_argument("--folder", default="", help="run folder, on a file system that all nodes share")
    parser.add_argument("--world", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--stop-s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started and stop")


def spec(options: argparse.Namespace, program: Sequence[str]) -> Loaded:
    """Job and site, checked."""
    values: dict[str, Any] = {}
    for name, value in (("world", options.world), ("stop_s", options.stop_s), ("folder", options.folder)):
        if value:
            values[name] = value
    if program:
        values["argv"] = list(program)
    return check.check(load(options.job, options.site, options.set, values=values))


def run(argv: Sequence[str], program: Sequence[str]) -> int:
    """Render, check, submit, follow."""
    parser = argparse.ArgumentParser(prog="launch slurm", usage=__doc__)
    add_spec(parser)
    parser.add_argument("--directive", action="append", default=[], metavar="NAME=VALUE", help="set one")
    parser.add_argument("--no-directive", action="append", default=[], metavar="NAME", help="remove one")
    parser.add_argument("--no-follow", action="store_true", help="return as soon as the job is in the queue")
    options = parser.parse_args(argv)
    loaded = spec(options, program)
    if not loaded.job.argv:
        parser.error("name the program after --, e.g. -- -m longctx train quickstart")
    script = render(loaded, directives.parse(options.directive, options.no_directive))
    for note in check.warnings(loaded.job, loaded.site):
        say(f"warning: {note}")
    if options.dry_run:
        print(script, end="")
        return DONE
    ids = submit.submit(loaded.job, script)
    folder = Path(loaded.job.folder)
    words = f"longctx launch status|logs|requeue|cancel {quote(str(folder))}"
    say(f"job {', '.join(ids)} is in the queue; {words}")
    return DONE if options.no_follow else _follow(loaded, ids)


def _follow(loaded: Loaded, ids: list[str]) -> int:
    folder = Path(loaded.job.folder)
    code = DONE
    try:
        for job_id in ids:
            code = submit.follow(job_id, folder / "launch")
    except KeyboardInterrupt:
        say(f"\nthe job goes on; longctx launch status|cancel {quote(str(folder))}")
        raise
    return code
