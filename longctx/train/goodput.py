"""How much of a run's wall time went into steps that stayed."""

import time

from .run_folder import RunFolder


class Goodput:
    """Seconds of committed steps, each counted once, over wall seconds since the run's first start.

    Starting, evaluating, saving, recovering, computing steps again and waiting in a queue all lower it.
    The last line of metrics.jsonl carries it from one process or job of a run to the next.
    """

    def __init__(self, folder: RunFolder) -> None:
        last = folder.last_row()
        self._began = folder.began()
        self._step = last.get("step", 0)
        self._useful_s = last.get("goodput", 0.0) * last.get("run_s", 0.0)

    def after(self, step: int, seconds: float) -> dict[str, float]:
        """Count a step, unless it is computed again; returns `goodput` and `run_s` for its row."""
        if step > self._step:
            self._step = step
            self._useful_s += seconds
        run_s = time.time() - self._began
        return {"goodput": self._useful_s / run_s, "run_s": run_s}
