"""What this rank is doing, for its heartbeat; and the points at which a rehearsed fault strikes."""

from collections.abc import Callable
from dataclasses import dataclass, field

PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "evaluate",
    "keep",
    "replicate",
    "checkpoint",
    "unwind",
    "join",
    "connect",
    "transfer",
    "end",
)
"""In the order of a step, then those of a recovery. `replicate` is in a thread, beside the next step."""


@dataclass(slots=True)
class Pulse:
    """Called with a phase whenever one begins; read by the heartbeat's thread."""

    step: int = -1
    """Optimizer step at work, counted from 0; -1: none yet."""
    phase: str = "start"
    """One of `PHASES`."""
    progress: int = 0
    """Grows with every phase, so that a slow step differs from a hang."""
    strike: Callable[[int, str], None] | None = field(default=None, repr=False)
    """Faults of a rehearsal (`longctx chaos`)."""

    def __call__(self, phase: str, step: int | None = None) -> None:
        """A phase begins."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.progress += 1
        if self.strike is not None:
            self.strike(self.step, phase)
