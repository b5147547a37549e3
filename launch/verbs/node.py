"""What a batch script calls around the training step: preflight, begin, verdict, attend."""

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from .. import attend as attending
from .. import exclusion
from .. import preflight as checking
from ..begin import Start
from ..begin import begin as begin_attempt
from ..local import say
from ..outcome import End
from ..outcome import verdict as judge_attempt
from ..protocol import DONE, PREFLIGHT_FAILED


def preflight(argv: Sequence[str]) -> int:
    """Examine this node and write the answer."""
    parser = argparse.ArgumentParser(prog="launch preflight")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", default="")
    for name in ("disk", "shm", "devices", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--clock", type=float, default=5.0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    values = {name: getattr(options, name) for name in ("disk", "shm", "clock", "devices", "port")}
    demands = checking.Demands(folder=options.out, names=tuple(options.names.split()), **values)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    answer = checking.examine(demands, node)
    checking.write(answer, options.out)
    return PREFLIGHT_FAILED if answer.problems else DONE


def begin(argv: Sequence[str]) -> int:
    """Choose the nodes of this attempt."""
    parser = argparse.ArgumentParser(prog="launch begin")
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("attempt", "candidates", "progress", "topology"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("later", "nodes", "processes", "no-progress"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--preflight", action="store_true")
    parser.add_argument("--partition", type=Path, help="what sinfo says about the nodes there are")
    parser.add_argument("--asked", type=int, default=0, help="nodes that the job asks for, with spares")
    parser.add_argument("--excluded", default="", help="nodes that the job excludes")
    options = vars(parser.parse_args(argv))
    options["candidates"] = options["candidates"].split()
    partition, asked, excluded = (options.pop(name) for name in ("partition", "asked", "excluded"))
    if partition:
        nodes = partition.read_text(encoding="utf-8").splitlines()
        options["choice"] = exclusion.Choice(asked=asked, nodes=nodes, excluded=excluded.split())
    for line in begin_attempt(Start(**options)):
        print(line, flush=True)
    return DONE


def verdict(argv: Sequence[str]) -> int:
    """Say how this attempt ended."""
    parser = argparse.ArgumentParser(prog="launch verdict")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    for name in ("code", "failures", "processes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    code, lines = judge_attempt(End(**vars(parser.parse_args(argv))))
    for line in lines:
        say(line)
    return code


def attend(argv: Sequence[str]) -> int:
    """Keep the output of this node's ranks below a limit."""
    parser = argparse.ArgumentParser(prog="launch attend")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True)
    options = parser.parse_args(argv)
    attending.attend(options.parent, options.logs, options.limit)
    return DONE
