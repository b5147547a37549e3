"""One process of a group that torchrun started."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.rendezvous import rendezvous

from ..build import World
from ..config.check import resolve
from ..config.load import LoadedConfig
from ..config.schema import Config
from ..errors import ConfigError, DataError
from ..protocol import BAD_INPUT, DONE, FAILED, REQUEUE, write_status
from .packages import check_packages


def work(loaded: LoadedConfig, body: Callable[[Config, World], int], *, status: Path) -> int:
    """Resolve the configuration for the world that torchrun made and run one rank of it.

    Args:
        loaded: as given on the command line of every rank.
        body: what this rank does; returns the exit code.
        status: where the job's end is told to the launcher.
    """
    rank = int(os.environ["RANK"])
    try:
        code = body(_resolved(loaded), _world(loaded.config))
        error = "" if code in (DONE, REQUEUE) else f"see logs/rank_{rank}.log"
    except Exception as problem:
        bad_input = isinstance(problem, ConfigError | DataError)
        _tell(status, BAD_INPUT if bad_input else FAILED, rank, f"{type(problem).__name__}: {problem}")
        raise
    if rank == 0 or code not in (DONE, REQUEUE):
        _tell(status, code, rank, error)
    return code


def _tell(status: Path, exit_code: int, rank: int, error: str) -> None:
    status.parent.mkdir(parents=True, exist_ok=True)
    write_status(status, exit_code, rank=rank, error=error)


def _resolved(loaded: LoadedConfig) -> Config:
    check_packages()
    return resolve(
        loaded.config,
        int(os.environ["WORLD_SIZE"]),
        _device(loaded.config),
        node_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    )


def _device(config: Config) -> str:
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _world(config: Config) -> World:
    """This process among the others, from the variables that torchrun sets."""
    store, rank, size = next(rendezvous("env://"))
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if _device(config) == "cuda" else torch.device("cpu")
    return World(rank=rank, size=size, device=device, store=store)
