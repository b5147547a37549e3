"""One process of a group that torchrun started."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.check import resolve
from ..config.load import LoadedConfig
from ..config.schema import Config
from ..errors import ConfigError, DataError
from ..protocol import BAD_INPUT, DONE, FAILED, REQUEUE, write_status
from . import standing
from .rendezvous import torchrun_world

if TYPE_CHECKING:
    from ..build import World


def work(loaded: LoadedConfig, body: Callable[[Config, "World"], int], *, status: Path) -> int:
    """Resolve the configuration for the world that torchrun made and run one rank of it.

    Args:
        loaded: as given on the command line of every rank.
        body: what this rank does; returns the exit code.
        status: where the job's end is told to the launcher.

    Returns:
        The exit code of this rank.
    """
    rank = int(os.environ["RANK"])
    standing.answer(status.parent / "logs", rank)
    if rank == 0 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        status.unlink(missing_ok=True)  # what the workers said whom torchrun has replaced
    try:
        code = body(_resolved(loaded), torchrun_world(_device(loaded.config)))
    except (ConfigError, DataError) as problem:
        if write_status(status, BAD_INPUT, rank=rank, error=str(problem)):  # else a peer has said it
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except Exception as problem:
        write_status(status, FAILED, rank=rank, error=f"{type(problem).__name__}: {problem}")
        raise
    if rank == 0:
        write_status(status, code, rank=rank)
    elif code not in (DONE, REQUEUE) and write_status(status, code, rank=rank, error="see its log"):
        print(f"error: rank {rank} ended with exit code {code}; see its log", file=sys.stderr, flush=True)
    return code


def _resolved(loaded: LoadedConfig) -> Config:
    return resolve(
        loaded.config,
        int(os.environ["WORLD_SIZE"]),
        _device(loaded.config),
        node_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    )


def _device(config: Config) -> str:
    return device_type(config.run.device)


def device_type(wanted: str) -> str:
    """`auto` as what this machine has."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
