"""Weights as the user writes them, checked and turned into functions of the step."""

from collections.abc import Callable, Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.units import parse
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.schema import SourceConfig


def class_weights(given: Mapping[str, float], classes: Sequence[int], key: str) -> dict[int, float]:
    """Weights by length class.

    Args:
        given: length in tokens (`8k`, `8192`) -> weight.
        classes: lengths that exist.
        key: name of the mapping, for messages.

    Raises:
        ConfigError: no such class, or a weight below zero.
    """
    weights: dict[int, float] = {}
    for text, weight in given.items():
        try:
            length = int(parse(str(text), "tokens"))
        except ValueError as error:
            raise ConfigError(f"{key}: {text!r} is no length in tokens ({error})") from error
        if length not in classes:
            raise ConfigError(
                f"{key}: {text} is no length class; choose among {', '.join(map(str, classes))} "
                "(powers of two from data.min_len to data.seq_len)"
            )
        if not weight >= 0:
            raise ConfigError(f"{key}: {text} has weight {weight}; choose 0 or more")
        weights[length] = float(weight)
    return weights


def source_weights(sources: "Sequence[SourceConfig]", steps: int) -> Callable[[int], list[float]]:
    """The sources' weights as a function of the step.

    A source's weight is constant, or follows the points of its schedule, linearly between them.

    Raises:
        ConfigError: a weight below zero, all zero, or a point outside 0..1.
    """
    if not sources:
        return lambda step: [1.0]
    points = [_points(source) for source in sources]

    def weights(step: int) -> list[float]:
        progress = step / max(1, steps - 1)
        return [float(np.interp(progress, at, value)) for at, value in points]

    for step in (0, steps - 1):
        if not sum(weights(step)) > 0:
            raise ConfigError(f"data.sources: all weights are 0 in step {step + 1}; give one a weight")
    return weights


def _points(source: "SourceConfig") -> tuple[list[float], list[float]]:
    try:
        given = {float(at): float(weight) for at, weight in source.schedule.items()}
    except ValueError as error:
        raise ConfigError(
            f"data.sources[{source.name}]: schedule={source.schedule} maps progress from 0 to 1 to weights, "
            f"both numbers ({error})"
        ) from error
    schedule = given or {0.0: source.weight}
    for at, weight in schedule.items():
        if not (0 <= at <= 1 and weight >= 0):
            raise ConfigError(
                f"data.sources[{source.name}]: weight {weight} at progress {at}; weights are 0 or more, "
                "progress runs from 0 (first step) to 1 (last step)"
            )
    progress = sorted(schedule)
    return progress, [schedule[each] for each in progress]


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
