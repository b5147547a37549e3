"""One trainer: `python -m longctx.cli.rank DESCRIPTOR --given FILE [--faults PLAN] FILE ... key=value ...`.

What the user wrote is there to be read by people (`cmd.txt`); the values come from the file that was given.

The node's supervisor starts it as a spare, with one end of a socket, and gives it a rank when there
is one to take.
"""

import argparse
import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config.check import resolve
from ..config.load import load
from ..errors import ConfigError
from ..protocol import BAD_INPUT, FAILED
from ..pulse import Pulse
from ..recovery.channel import Channel
from . import standing
from .arguments import parse
from .worker import device_type

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Be one rank; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # until the run takes them; the others' stop is enough
    _die_with_parent()
    # Cut connections are no news here; torch would print its stack for each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    descriptor, *words = argv
    pulse = Pulse()
    channel = Channel(int(descriptor), pulse)
    arguments = parse(_parser(), words)
    config = load([arguments.options.given]).config
    _import_everything()
    channel.warm()
    from ..recovery.faults import Faults
    from ..recovery.repaired import Place, Repaired
    from ..recovery.replicate import Memory
    from ..train.loop import train

    told = channel.assignment()
    place = Place(**{name: told[name] for name in Place.__dataclass_fields__})
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank))
    standing.answer(Path(config.run.dir, "logs"), place.rank)
    memory = Memory()
    if arguments.options.faults:
        faults = Faults.read(arguments.options.faults, rank=place.rank)
        pulse.strike, faults.held = faults.strike, memory.held
    try:
        kind = device_type(config.run.device)
        config = replace(config, run=replace(config.run, device="cuda" if kind == "cuda" else "cpu"))
        config = resolve(config, place.size, kind, node_ranks=place.local_size)
        code = train(config, Repaired(channel, pulse, place, memory))
    except ConfigError as error:
        channel.end(BAD_INPUT, str(error))
        return BAD_INPUT
    except Exception as error:
        channel.failing(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longctx.cli.rank", allow_abbrev=False)
    parser.add_argument("--given", required=True, help="file with every value")
    parser.add_argument("--faults", default="", help="plan of a rehearsal")
    return parser


def _die_with_parent() -> None:
    """A trainer without a supervisor would compute for nobody."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _import_everything() -> None:
    """All that makes a first step slow: torch, this package, and what AdamW imports at its first step."""
    import torch
    import torch.distributed.fsdp

    from ..train import loop  # noqa: F401

    parameter = torch.nn.Parameter(torch.zeros(8))
    parameter.grad = torch.zeros(8)
    torch.optim.AdamW([parameter], fused=True).step()
    gc.collect()
    gc.freeze()  # a collection between memberships looks at what was made since alone


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
