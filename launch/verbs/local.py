"""`launch local [--job FILE] [--site FILE] [--set KEY=VALUE] [--folder RUN] [--port P] -- PROGRAM ...`."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import here, local
from ..protocol import DONE
from ..submit import record
from . import slurm


def run(argv: Sequence[str], program: Sequence[str]) -> int:
    """Start the program on this machine; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch local", usage=__doc__)
    slurm.add_spec(parser)
    parser.add_argument("--port", type=int, default=0, help="port of the rendezvous; 0: any free one")
    options = parser.parse_args(argv)
    loaded = slurm.spec(options, program)
    if not loaded.job.argv:
        parser.error("name the program after --, e.g. -- -m longctx train quickstart")
    job = replace(here.job_here(loaded), port=options.port)
    if not options.folder:
        job = replace(job, status=None, log=None)
    if options.dry_run:
        print(shlex.join(local.dry_run(job)))
        return DONE
    if options.site:
        here.examine(loaded)
    if options.job or options.site:
        content = {"backend": "local", "ids": [str(os.getpid())], "processes": job.processes}
        record(Path(loaded.job.folder), content)
    return local.run(job)
