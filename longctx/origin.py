"""The three packages must come from one place: other software ships a `launch` or a `parallel`.

Imports nothing of the project, so that it can speak before an intruder breaks an import.
"""

from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
NAMES = ("longctx", "parallel", "launch")


def intruder(path: Sequence[str]) -> str | None:
    """What is wrong with an import path: the package that would be imported instead of ours, or None."""
    for name in NAMES:
        spec = PathFinder.find_spec(name, list(path))
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None:
            return f"package {name} is missing beside longctx in {HOME}; reinstall longctx-runtime"
        if found != HOME / name / "__init__.py":
            return (
                f"`import {name}` finds {found} instead of {HOME / name}; "
                "run from another folder, or uninstall or rename that package"
            )
    return None
