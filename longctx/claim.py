"""A run folder belongs to one run at a time: a process of its first node holds `run.lock` while it lives."""

import fcntl
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

from .errors import ConfigError, FolderBusy
from .protocol import STATUS

LOCK = "run.lock"
TRACES = ("metrics.jsonl", "ckpt")
PATIENCE_S = 60.0
"""What the first rank of an earlier attempt may take to die."""
MOMENT_S, POLL_S = 2.0, 0.05


def check_unused(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, unless it has ended and is to be continued; nothing is taken.

    Raises:
        FolderBusy: a run is at work there.
        ConfigError: as `check_traces`, or it cannot be a folder.
    """
    check_idle(folder)
    check_traces(folder, resume=resume)
    _make(folder)


def check_traces(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, unless it is to be continued.

    Raises:
        ConfigError: the folder has metrics or checkpoints and `run.resume` is not set, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir={folder} is a file; choose a folder")
    if not resume and any((folder / name).exists() for name in TRACES):
        raise ConfigError(
            f"run.dir={folder} already holds a run; add run.resume=true to continue it, "
            "or set run.dir to a new folder"
        )


def check_idle(folder: Path, *, job: str = "") -> None:
    """Refuse the folder of a run that is at work, unless it is this job.

    Raises:
        FolderBusy: naming its process.
    """
    until = time.monotonic() + MOMENT_S
    while who := _holder(folder / LOCK):
        if job and who.endswith(f"job {job}"):
            return
        if not job or time.monotonic() >= until:  # rank 0 may be about to write its name
            raise FolderBusy(
                f"run.dir={folder} belongs to a run that is at work ({who}); set run.dir to another folder"
            )
        time.sleep(POLL_S)


def enter(folder: Path, environment: Mapping[str, str]) -> AbstractContextManager[object]:
    """The folder as this job's, for a process that torchrun started, before anything is written there.

    Args:
        folder: run folder.
        environment: with torchrun's variables.

    Returns:
        On rank 0 the hold on the folder, which also lasts across exec; an earlier run's status file is gone.

    Raises:
        FolderBusy: another run is at work there.
        ConfigError: nothing can be written there.
    """
    job = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"  # no other job has it at the time
    again = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if environment["RANK"] == "0":
        held = claim(folder, job=job, patience_s=PATIENCE_S if again else 0.0)
        if not again:
            (folder / STATUS).unlink(missing_ok=True)  # how an earlier run ended
        return held
    if not again:
        check_idle(folder, job=job)
    return nullcontext()


def claim(folder: Path, *, job: str, patience_s: float = 0.0) -> TextIO:
    """Take the folder; it is held while the result is open and this process lives.

    Args:
        folder: run folder; it is made.
        job: name by which the other ranks know that it is theirs.
        patience_s: how long to wait for another process to let go.

    Raises:
        FolderBusy: another run is at work there.
        ConfigError: nothing can be written there.
    """
    _make(folder)
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        until = time.monotonic() + max(patience_s, MOMENT_S)
        while not _locked(file, fcntl.LOCK_EX):  # also while another process only looks
            if time.monotonic() >= until:
                check_idle(folder)
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, job {job}")
        file.flush()
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: nothing can be written there: {error.strerror}") from error
    os.set_inheritable(file.fileno(), True)
    return file


def _make(folder: Path) -> None:
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be created: {error.strerror}; choose another") from error


def _holder(path: Path) -> str:
    """What the process that holds a lock file says of itself; empty: nobody does."""
    try:
        with path.open(encoding="utf-8") as file:
            return "" if _locked(file, fcntl.LOCK_SH) else file.read() or "another process"
    except OSError:
        return ""  # no run has been here, or it is not ours to read: what follows will say so


def _locked(file: TextIO, how: int) -> bool:
    try:
        fcntl.lockf(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        return True
    return True
