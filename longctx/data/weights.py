"""Weights as the user writes them, checked and turned into functions of the step."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

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
    schedule = {float(at): float(weight) for at, weight in source.schedule.items()} or {0.0: source.weight}
    for at, weight in schedule.items():
        if not (0 <= at <= 1 and weight >= 0):
            raise ConfigError(
                f"data.sources[{source.name}]: weight {weight} at progress {at}; weights are 0 or more, "
                "progress runs from 0 (first step) to 1 (last step)"
            )
    progress = sorted(schedule)
    return progress, [schedule[each] for each in progress]
