"""The run folder before the run."""

from pathlib import Path

from ..errors import ConfigError, FolderBusy
from ..files import LOCK, holder

STATUS = "status.json"
TRACES = ("metrics.jsonl", "ckpt")


def check_unused(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, unless it has ended and is to be continued.

    Raises:
        FolderBusy: a run is at work there.
        ConfigError: the folder has metrics or checkpoints and `run.resume` is not set, or it
            cannot be a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir={folder} is a file; choose a folder")
    if who := holder(folder / LOCK):
        raise FolderBusy(
            f"run.dir={folder} belongs to a run that is at work ({who}); set run.dir to another folder"
        )
    if not resume and any((folder / name).exists() for name in TRACES):
        raise ConfigError(
            f"run.dir={folder} already holds a run; add run.resume=true to continue it, "
            "or set run.dir to a new folder"
        )
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be created: {error.strerror}; choose another") from error
