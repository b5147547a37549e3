"""From a command line outside torchrun to `python -m launch local`, with everything checked first."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..config.check import resolve
from ..config.load import LoadedConfig
from ..config.schema import Config
from ..errors import ConfigError
from ..origin import intruder
from .machine import choose_local, pinned

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def start(verb: str, loaded: LoadedConfig, *, folder: Path, options: Sequence[str] = ()) -> NoReturn:
    """Check the configuration for this machine, prepare the data, become the launcher; see `launcher`."""
    become_launcher(launcher(verb, loaded, folder=folder, options=options))


def launcher(
    verb: str, loaded: LoadedConfig, *, folder: Path, options: Sequence[str] = (), starts: bool = True
) -> list[str]:
    """Check the configuration for this machine and prepare the data.

    Args:
        verb: the verb that the workers run.
        loaded: its configuration.
        folder: run folder, where the status file and torchrun's log go.
        options: the verb's own options.
        starts: whether the run is to start, for which the data is prepared.

    Returns:
        Arguments of `python -m launch`.

    Raises:
        ConfigError: before any process is started.
    """
    check_packages()
    local = choose_local(loaded.config)
    config, found = pinned(loaded.config, local)
    resolve(config, local.processes, local.device, node_ranks=local.processes)
    if starts:
        prepare_data(config)
    program = ["-m", "longctx", verb, *loaded.files, *loaded.overrides, *found, *options]
    return [
        "local",
        f"--set=processes={local.processes}",
        f"--port={config.run.port}",
        f"--folder={folder}",
        "--",
        *program,
    ]


def prepare_data(config: Config) -> None:
    """Prepare the documents before any rank starts, and describe them where that was needed."""
    from ..data.prepare import describe, prepare

    prepared = prepare(config.data, progress=True)
    if prepared.created:
        print(describe(prepared, config.data.seq_len))


def check_packages() -> None:
    """Refuse to start workers that would import another package of the same name.

    Raises:
        ConfigError: naming the intruder.
    """
    problem = intruder([str(Path.cwd()), *sys.path])  # `python -m` puts the working folder in front
    if problem:
        raise ConfigError(problem)


def become_launcher(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m launch`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launch", *arguments])
