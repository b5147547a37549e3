"""When a run saves: every so many steps, and often enough where a stop leaves too little time for a save.

A scheduler that preempts a job kills it some seconds after its signal (`checkpoint.grace_s`). A step and
a save that fit are all that is needed. Where they do not, only saves from before the signal count; so the
run saves in the background all the time, with pauses as long as its saves, and a kill costs about that.
"""

import math
import time
from pathlib import Path

from .. import checkpoint
from ..build import Run
from ..config.schema import CheckpointConfig
from .run_folder import RunFolder

MARGIN = 1.5
"""A save that takes this many times its measured time still has to fit."""
SPACING, SPACING_STALLED = 2, 20
"""Time from one save to the next in saves: behind the steps, or with the steps waiting for them."""


def interval(config: CheckpointConfig, *, step_s: float, save_s: float) -> int:
    """Steps from one save to the next that the grace time asks for.

    Args:
        config: what is known of it.
        step_s: seconds of a step.
        save_s: seconds of a save until it counts.

    Returns:
        0 where a step and a save fit into the grace time, or nothing is known of it.
    """
    if not config.grace_s or MARGIN * (step_s + save_s) <= config.grace_s:
        return 0
    spacing = SPACING if config.background else SPACING_STALLED
    return max(1, math.ceil(spacing * save_s / max(step_s, 1e-6)))


class Saves:
    """The saves of one run on one membership; every method is called by all ranks together."""

    def __init__(self, run: Run, folder: RunFolder, *, found: Path | str | None) -> None:
        self._run, self._folder = run, folder
        self._saver = checkpoint.Saver(run)
        self._begun: int | None = None
        self._step_s = self._save_s = 0.0
        self._interval = 0
        self.newest = found
        """Path of the newest checkpoint."""

    def look(self) -> None:
        """Find the newest checkpoint after a recovery."""
        self.newest = self._saver.newest()

    @property
    def measured_s(self) -> float:
        """Rank 0: seconds of the newest save that counts; 0: none yet, or another rank."""
        return self._saver.seconds

    def saw(self, *, step_s: float, save_s: float) -> None:
        """Take note of a step; both numbers are the same on every rank."""
        self._step_s, self._save_s = step_s, save_s

    def due(self, step: int) -> bool:
        """Whether the run saves after this step, which is not its last."""
        config = self._run.config.checkpoint
        return bool(config.every and step % config.every == 0) or self._pressed(step, config)

    def _pressed(self, step: int, config: CheckpointConfig) -> bool:
        """Whether the grace time asks for a save; the first one is there to be measured."""
        if not config.grace_s or not self._save_s:
            return bool(config.grace_s) and self._begun is None
        steps = interval(config, step_s=self._step_s, save_s=self._save_s)
        if steps and not self._interval:
            facts = {"every": steps, "save_s": round(self._save_s, 3), "step_s": round(self._step_s, 3)}
            self._folder.event("pace", step=step, grace_s=config.grace_s, **facts)
        self._interval = steps
        return bool(steps) and (self._begun is None or step - self._begun >= steps)

    def save(self, *, last: bool) -> None:
        """Save; in the background while there are steps to come. `stall_s` is what training waited."""
        run = self._run
        run.pulse("checkpoint")
        started = time.perf_counter()
        self._begun = run.progress.step
        self.newest = self._saver.save(background=run.config.checkpoint.background and not last)
        facts = {"stall_s": round(time.perf_counter() - started, 4)}
        if self.measured_s:
            facts["save_s"] = round(self.measured_s, 4)
        self._folder.event("checkpoint", step=self._begun, path=str(self.newest), **facts)

    def keep_last(self) -> None:
        """Save the state that the run ends in, where the newest checkpoint is of an earlier step."""
        step = self._run.progress.step
        if step and not str(self.newest).endswith(checkpoint.step_name(step)):
            self.save(last=True)
        self.wait()

    def wait(self) -> None:
        """Return when the newest save counts."""
        self._saver.wait()

    def forget(self) -> None:
        """Delete the checkpoints of steps that the run has gone back before; if none is left, save."""
        had = self.newest is not None
        self.newest = self._saver.forget(self._run.progress.step)
        if had and self.newest is None:
            self.save(last=False)

    def abandon(self) -> None:
        """Give up a save whose ranks are not all there any more."""
        self._saver.abandon()
