"""A process that a supervisor has started, with a rank or spare."""

import signal
import subprocess
import time
from dataclasses import dataclass, field

from .lines import Lines


@dataclass(kw_only=True, slots=True)
class Trainer:
    """A process of ours, with a rank or spare."""

    process: "subprocess.Popen[bytes]"
    """The process."""
    lines: Lines
    """What it says."""
    rank: int | None = None
    """Its rank; None: spare."""
    warm: bool = False
    """Whether it has imported torch."""
    heard: float = field(default_factory=time.monotonic)
    """When it last said something."""
    beat: tuple[int, int] = (-1, 0)
    """Step and progress of its last heartbeat."""
    ended: bool = False
    """Whether it has said how it ends; it then waits for the verdict."""
    error: str | None = None
    """What it says went wrong before it ends."""
    killed: str | None = None
    """Why we killed it."""


def how_it_ended(trainer: Trainer, code: int) -> str:
    """Why a rank is lost, in words for people."""
    if trainer.killed:
        return trainer.killed
    if code < 0:
        try:
            return f"died, killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"died, killed by signal {-code}"
    return (
        f"failed ({trainer.error})"
        if trainer.error
        else f"ended with exit code {code} in the middle of the run"
    )
