"""`shape`, `doctor`, `examples`."""

import argparse
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .. import check, here, preflight, submit
from .. import examples as rendering
from ..load import load
from ..protocol import DONE, PREFLIGHT_FAILED
from . import slurm


def shape(argv: Sequence[str]) -> int:
    """Print the nodes, processes and devices that a job and a site make, and what a stop leaves."""
    parser = argparse.ArgumentParser(prog="launch shape")
    slurm.add_spec(parser)
    parser.add_argument("--here", action="store_true", help="refuse what this machine alone cannot do")
    parser.add_argument("--submits", action="store_true", help="refuse a machine without sbatch")
    options = parser.parse_args(argv)
    asked = load(options.job, options.site, options.set).job.processes > 0
    loaded = slurm.spec(options, [])
    job = loaded.job
    if options.here:
        here.job_here(loaded)
    if options.submits:
        submit.check_sbatch()
    devices, grace = check.devices(job, loaded.site), check.grace(loaded, here=options.here)
    content: dict[str, int] = {"nodes": job.nodes, "processes": job.processes, "devices": devices}
    print(json.dumps(content | {"grace": grace, "chosen": devices > 0 or asked}))
    return DONE


def doctor(argv: Sequence[str]) -> int:
    """Examine this machine as preflight does on a node."""
    parser = argparse.ArgumentParser(prog="launch doctor")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder that must be writable")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args(argv)
    answer = preflight.examine(preflight.Demands(folder=options.folder), socket.gethostname())
    if options.json:
        print(json.dumps(asdict(answer)))
    else:
        print("\n".join(f"{key:<12} {value}" for key, value in answer.facts.items()))
        print("\n".join(f"problem: {each}" for each in answer.problems) or "no problem found")
    return PREFLIGHT_FAILED if answer.problems else DONE


def examples(argv: Sequence[str]) -> int:
    """Render the examples anew, or with --check say which differ."""
    parser = argparse.ArgumentParser(prog="launch examples")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    return rendering.write(check_only=parser.parse_args(argv).check)
