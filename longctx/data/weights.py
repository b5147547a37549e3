"""The sources' weights as functions of the step: what the user wrote, or what losses make of it."""

from collections.abc import Callable, Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.weights import source_points

if TYPE_CHECKING:
    from ..config.schema import SourceConfig


def source_weights(sources: "Sequence[SourceConfig]", steps: int) -> Callable[[int], list[float]]:
    """The sources' weights as a function of the step.

    A source's weight is constant, or follows the points of its schedule, linearly between them.

    Raises:
        ConfigError: see `source_points`.
    """
    if not sources:
        return lambda step: [1.0]
    points = source_points(sources)

    def weights(step: int) -> list[float]:
        progress = step / max(1, steps - 1)
        return [float(np.interp(progress, at, value)) for at, value in points]

    return weights


class LossWeights:
    """Source weights that follow losses: a source above its reference loss gets more.

    Every `every` steps each weight is multiplied by exp(max(loss - reference, 0)), loss being the mean
    over the steps since the last change, and all are scaled to add up to 1. A change counts from
    `AHEAD` steps later, because the next steps are already drawn. The state belongs in checkpoints: with
    it, draws stay a pure function of (seed, step).

    Source: Xia et al., "Sheared LLaMA", ICLR 2024, algorithm 1 (there with held-out losses).
    """

    AHEAD = 3

    def __init__(
        self, base: Callable[[int], list[float]], references: Sequence[float], *, every: int
    ) -> None:
        self.base = base
        """Weights before the first change."""
        self._references, self._every = tuple(references), every
        self._changes: list[tuple[int, list[float]]] = []
        self._sums = [[0.0, 0.0] for _ in references]

    def __call__(self, step: int) -> list[float]:
        """Weights of a step: the last change that counts by then, else what the user gave."""
        return self.changed(step) or self.base(step)

    def changed(self, step: int) -> list[float] | None:
        """Weights of the last change that counts by a step; None: the user's still hold."""
        return next((weights for first, weights in reversed(self._changes) if first <= step), None)

    def measured(self, step: int, losses: Sequence[tuple[float, float]]) -> int | None:
        """Take in a finished step.

        Args:
            step: its number, from 0.
            losses: loss sum and trained tokens of each source, over all ranks.

        Returns:
            First step that has other weights now; None: nothing has changed.
        """
        for own, more in zip(self._sums, losses, strict=True):
            own[0], own[1] = own[0] + more[0], own[1] + more[1]
        if (step + 1) % self._every:
            return None
        mean = [loss / max(1.0, tokens) for loss, tokens in self._sums]
        excess = [max(loss - ref, 0.0) for loss, ref in zip(mean, self._references, strict=True)]
        weights = [w * exp(e) for w, e in zip(self(step + self.AHEAD), excess, strict=True)]
        self._changes.append((step + self.AHEAD, [w / sum(weights) for w in weights]))
        self._sums = [[0.0, 0.0] for _ in self._references]
        return step + self.AHEAD

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"changes": self._changes, "sums": self._sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._changes = [(int(first), [float(w) for w in weights]) for first, weights in state["changes"]]
        self._sums = [[float(loss), float(tokens)] for loss, tokens in state["sums"]]
