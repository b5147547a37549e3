"""The three packages must come from one place: other software ships a `launch` or a `parallel`."""

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import ConfigError

HOME = Path(__file__).resolve().parents[2]
NAMES = ("longctx", "parallel", "launch")


def check_packages(path: Sequence[str] | None = None) -> None:
    """Refuse to go on where a worker would import another package of the same name.

    Args:
        path: import path of a worker; by default this one's with the working folder in front,
            where `python -m` puts it.

    Raises:
        ConfigError: naming the intruder.
    """
    path = [str(Path.cwd()), *sys.path] if path is None else path
    for name in NAMES:
        spec = PathFinder.find_spec(name, list(path))
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found == HOME / name / "__init__.py":
            continue
        if found is None:
            raise ConfigError(
                f"package {name} is missing beside longctx in {HOME}; reinstall longctx-runtime"
            )
        raise ConfigError(
            f"`import {name}` finds {found} instead of {HOME / name}; "
            "run from another folder, or uninstall or rename that package"
        )
