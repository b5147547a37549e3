"""Which checkpoints a folder holds, which of them are good, and which may go."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from ..errors import CheckpointError
from ..tensors.folder import Folder, Where, folder_at, is_url
from .manifest import MANIFEST, verify

AnyWhere = TypeVar("AnyWhere", bound=Where)
PREFIX = "step-"
PARTIAL = ".partial"


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None: the name is none."""
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else None


def list_checkpoints(where: Where) -> list[Where]:
    """The complete checkpoints below a folder, oldest first."""
    folder = folder_at(where)
    names = [name for name in folder.names() if step_of(name) is not None]
    return [folder.folder(name).where for name in names if folder.size(f"{name}/{MANIFEST}") is not None]


def checkpoints_below(name: str) -> list[Where]:
    """The checkpoints that a name means: a run's, wherever its config keeps them, or a folder's own."""
    places: list[Where] = [name]
    if not is_url(name):
        configured = _configured(Path(name) / "config.resolved.yaml")
        places = [Path(name) / "ckpt" if configured == "auto" else configured, Path(name)]
    for place in places:
        if found := list_checkpoints(place):
            return found
    return []


def _configured(path: Path) -> str:
    """`checkpoint.dir` of a run."""
    if not path.is_file():
        return "auto"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(config["checkpoint"]["dir"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return "auto"  # of another version, or altered by hand: then where it is by default


def latest_good(where: Where) -> Where | None:
    """The newest checkpoint below a folder whose files all match its manifest, or None.

    Damaged ones are passed over and named in a warning line.
    """
    return newest_good(list_checkpoints(where))


def newest_good(paths: Sequence[Where]) -> Where | None:
    """The last of some checkpoints, oldest first, that is good; see `latest_good`."""
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warn(f"{error}; trying the checkpoint before it")
    return None


def warn(message: str) -> None:
    """One line for the person who reads the run."""
    print(f"warning: {message}", flush=True)


def prunable(paths: Sequence[AnyWhere], *, keep: int, milestone_every: int) -> list[AnyWhere]:
    """Checkpoints that are neither among the latest `keep` nor milestones.

    Args:
        paths: all checkpoints of a run, oldest first.
        keep: latest ones that stay; 0: all.
        milestone_every: multiples of this step stay for good; 0: none do.
    """
    old = paths[:-keep] if keep > 0 else []
    return [path for path in old if not milestone_every or step_at(path) % milestone_every]


def remove(path: Where) -> None:
    """Delete a checkpoint, its manifest first: a kill in the middle leaves nothing that looks whole."""
    folder = folder_at(path)
    folder.remove(MANIFEST)
    folder.remove()


def sweep(folder: Folder) -> None:
    """Delete what killed saves have left below the folder of a run's checkpoints."""
    for name in folder.names():
        if name.startswith(f".{PREFIX}") and name.endswith(PARTIAL):
            folder.remove(name)


def step_at(path: Where) -> int:
    """Optimizer steps done in a checkpoint."""
    return step_of(str(path).rstrip("/").rpartition("/")[2]) or 0
