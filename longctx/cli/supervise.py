"""From a process that torchrun started to its node's supervisor, where lost ranks are replaced."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..claim import check_traces, enter
from ..config.check import check_replicas, resolve
from ..config.load import LoadedConfig
from ..config.schema import Config
from ..config.show import to_yaml
from ..errors import ConfigError
from ..files import write_text
from ..protocol import BAD_INPUT, STATUS, write_status
from .machine import visible_gpus


def repairs(config: Config) -> bool:
    """Whether a lost rank of this job is replaced: others are there to keep its state."""
    return config.recovery.mode != "off" and int(os.environ["WORLD_SIZE"]) > 1


def become_supervisor(loaded: LoadedConfig, options: Sequence[str] = ()) -> NoReturn:
    """Check what can be checked without torch, then replace this process; see docs/recovery.md.

    Args:
        loaded: the configuration.
        options: of the trainers, before the files.

    Raises:
        FolderBusy: another run is at work in the folder.
    """
    config, folder = loaded.config, Path(loaded.config.run.dir)
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt:
        _leave_if_over(folder)
    with enter(folder, os.environ):
        try:
            _check(config, folder, first=rank == 0 and attempt == 0)
        except ConfigError as problem:
            if write_status(folder / STATUS, BAD_INPUT, rank=rank, error=str(problem)):
                print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(BAD_INPUT)
        _replace_this_process(loaded, [*options, f"--given={_give(config, folder)}"])


def _give(config: Config, folder: Path) -> Path:
    """What this attempt's trainers on this node read: one that starts later must not see an edited recipe."""
    path = folder / "logs" / f"given.{os.environ['GROUP_RANK']}.yaml"
    try:
        if os.environ["LOCAL_RANK"] == "0":
            write_text(path, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: nothing can be written there: {error.strerror}") from error
    return path


def _replace_this_process(loaded: LoadedConfig, options: Sequence[str]) -> NoReturn:
    settings = loaded.config.recovery
    arguments = [
        f"--folder={loaded.config.run.dir}",
        f"--spares={settings.spares}",
        f"--heartbeat-s={settings.heartbeat_s}",
        f"--hang-s={settings.hang_s}",
        f"--max-failures={settings.max_failures}",
    ]
    program = ["-m", "longctx.cli.rank", "{}", *options, *loaded.files, *loaded.overrides]
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "launch.supervise", *arguments, "--", *program]
    os.execv(sys.executable, command)


def _check(config: Config, folder: Path, *, first: bool) -> None:
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if first:
        check_traces(folder, resume=config.run.resume)
    device = config.run.device
    if device == "auto":  # without torch, which costs a second
        device = "cuda" if visible_gpus() else "cpu"
    resolve(config, size, device, node_ranks=local)
    check_replicas(config, size)


def _leave_if_over(folder: Path) -> None:
    """After a restart by torchrun: a job that has said how it ended is not begun again."""
    try:
        code = int(json.loads((folder / STATUS).read_text())["exit_code"])
    except (OSError, ValueError, KeyError):
        return
    sys.exit(code)
