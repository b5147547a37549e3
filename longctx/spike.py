"""Loss spikes: noticed before the optimizer step, alike on all ranks.

A value is a spike if it is not finite, or if its robust z-score over the last good steps,
(x - median) / (1.4826 MAD), exceeds `train.spike_z`. Loss and gradient norm are sums over all ranks, so
every rank judges the same numbers. Skipping the batches around a spike and going back to an earlier state
is what PaLM did by hand (Chowdhery et al., 2022, section 5.1).
"""

import math
from collections import deque
from statistics import median
from typing import Any

from .errors import TrainingDiverged

WINDOW = 64
"""Good steps that a value is compared with."""
NEEDED = 16
"""Fewer say nothing about what is usual."""
_MAD_TO_SIGMA = 1.4826
_FLOOR = 1e-3
"""Least spread, as a share of the median: values that hardly move would make anything a spike."""


class LossSpike(TrainingDiverged):
    """A step whose loss or gradient norm is no ordinary one; parameters are not updated."""


class SpikeWatch:
    """Remembers what is usual."""

    def __init__(self, threshold: float) -> None:
        """Start without a memory.

        Args:
            threshold: z-score above which a value is a spike; 0: only values that are not finite are.
        """
        self._threshold = threshold
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def judge(self, loss: float, grad_norm: float) -> None:
        """Take a step's values.

        Raises:
            LossSpike: they are unusual; they are not remembered.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise LossSpike(f"loss {loss} and gradient norm {grad_norm}")
        if self._threshold and len(self._seen) >= NEEDED:
            for name, value, usual in zip(
                ("loss", "gradient norm"), (loss, grad_norm), zip(*self._seen, strict=True), strict=True
            ):
                score = robust_z(value, usual)
                if score > self._threshold:
                    raise LossSpike(
                        f"{name} {value:.4g} is {score:.1f} deviations above the last {len(usual)} steps "
                        f"(train.spike_z={self._threshold:g})"
                    )
        self._seen.append((loss, grad_norm))

    def state(self) -> list[Any]:
        """What is remembered, as JSON."""
        return [list(pair) for pair in self._seen]

    def restore(self, state: list[Any]) -> None:
        """Remember what `state` said."""
        self._seen = deque(((loss, norm) for loss, norm in state), maxlen=WINDOW)


def robust_z(value: float, usual: tuple[float, ...]) -> float:
    """Deviations of a value above the median, by the median absolute deviation."""
    middle = median(usual)
    spread = _MAD_TO_SIGMA * median(abs(each - middle) for each in usual)
    return (value - middle) / max(spread, _FLOOR * abs(middle), 1e-12)
