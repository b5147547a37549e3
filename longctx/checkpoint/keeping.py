"""Which checkpoints a folder holds, which of them are good, and which may go."""

from ..errors import CheckpointError
from ..tensors.folder import Folder, Where, folder_at
from .manifest import MANIFEST, verify

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


def latest_good(where: Where) -> Where | None:
    """The newest checkpoint below a folder whose files all match its manifest, or None.

    Damaged ones are passed over and named in a warning line.
    """
    for path in reversed(list_checkpoints(where)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warn(f"{error}; trying the checkpoint before it")
    return None


def warn(message: str) -> None:
    """One line for the person who reads the run."""
    print(f"warning: {message}", flush=True)


def prunable(where: Where, *, keep: int, milestone_every: int) -> list[Where]:
    """Checkpoints that are neither among the latest `keep` nor milestones.

    Args:
        where: the folder of the checkpoints.
        keep: latest ones that stay; 0: all.
        milestone_every: multiples of this step stay for good; 0: none do.
    """
    if keep <= 0:
        return []
    old = list_checkpoints(where)[:-keep]
    return [path for path in old if not milestone_every or _step(path) % milestone_every]


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


def _step(path: Where) -> int:
    return step_of(str(path).rstrip("/").rpartition("/")[2]) or 0
