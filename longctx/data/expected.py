"""How much each source is to give in the rest of a cycle: its weights, summed over the steps to come."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .packing import Floats
from .weights import LossWeights

Bools = npt.NDArray[np.bool_]


def shares(weights: Floats, live: Bools) -> Floats:
    """Weights as shares of a step: those of sources that can give, adding up to 1.

    Args:
        weights: float64 [..., sources], not negative.
        live: bool [sources].

    Returns:
        float64 [..., sources]; zeros where no live source has a weight.
    """
    own = np.where(live, weights, 0.0)
    total = own.sum(axis=-1, keepdims=True)
    found: Floats = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
    return found


class Expected:
    """What the source weights add up to, as far as a step can know.

    A schedule is known for all steps. Weights that follow losses are expected to stay as they are: what a
    later step brings must not change the draws of an earlier one, or a replay would draw others.
    """

    def __init__(self, weights: Callable[[int], Sequence[float]]) -> None:
        self._weights = weights
        self._span = (0, 0)
        self._table = np.zeros((0, 0))  # [steps of the span, sources]
        self._live = b""
        self._suffix = self._table

    def rest(self, step: int, span: tuple[int, int], live: Bools) -> Floats:
        """Shares summed from a step to the end of its cycle.

        Args:
            step: the first one that counts.
            span: first step of the cycle, and of the next one.
            live: bool [sources], which can give.

        Returns:
            float64 [sources], in budgets of a step; they add up to the number of steps.
        """
        weights: Callable[[int], Sequence[float]] = self._weights
        if isinstance(weights, LossWeights):
            changed = weights.changed(step)
            if changed is not None:
                return shares(np.asarray(changed, dtype=np.float64), live) * (span[1] - step)
            weights = weights.base
        if self._span != span:
            self._span, self._live = span, b""
            self._table = np.array([weights(s) for s in range(*span)], dtype=np.float64)
        if self._live != live.tobytes():
            self._live = live.tobytes()
            self._suffix = np.cumsum(shares(self._table, live)[::-1], axis=0)[::-1]
        found: Floats = self._suffix[step - span[0]]
        return found

    def forget(self) -> None:
        """The weights are others now."""
        self._span = (0, 0)
