"""Weights as the user writes them, checked: by length class, by source and by training progress. Pure."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from math import inf

from ..errors import ConfigError
from .schema import SourceConfig
from .units import parse

Points = tuple[tuple[float, ...], tuple[float, ...]]
"""Training progress from 0 to 1, ascending, and the weight there."""


def class_weights(given: Mapping[str, float], classes: Sequence[int], key: str) -> dict[int, float]:
    """Weights by length class.

    Args:
        given: length in tokens (`8k`, `8192`) -> weight.
        classes: lengths that exist.
        key: name of the mapping, for messages.

    Raises:
        ConfigError: no such class, or a weight below zero or not finite.
    """
    weights: dict[int, float] = {}
    for text, weight in given.items():
        try:
            length = parse(str(text), "tokens")
        except ValueError as error:
            raise ConfigError(f"{key}: {text!r} is no length in tokens ({error})") from error
        if length not in classes:
            raise ConfigError(
                f"{key}: {text} is no length class; choose among {', '.join(map(str, classes))} "
                "(powers of two from data.min_len to data.seq_len)"
            )
        if not 0 <= weight < inf:
            raise ConfigError(f"{key}: {text} has weight {weight}; choose 0 or more, and a finite number")
        weights[length] = float(weight)
    return weights


def source_points(sources: Sequence[SourceConfig]) -> list[Points]:
    """Each source's schedule; a constant weight is a schedule of one point.

    Raises:
        ConfigError: a weight below zero or not finite, a point outside 0..1, or all weights zero somewhere.
    """
    points = [_points(source) for source in sources]
    # Between two neighbouring points all weights are linear: all zero somewhere is all zero at a point.
    for at in sorted({0.0, 1.0}.union(*(progress for progress, _ in points))):
        if not any(_is_positive(each, at) for each in points):
            raise ConfigError(
                f"data.sources: all weights are 0 at progress {at:g} of the training; give one a weight there"
            )
    return points


def _is_positive(points: Points, at: float) -> bool:
    """Whether a schedule has a weight at some progress; beyond its ends it stays as it is there."""
    progress, weights = points
    if at in progress:
        return weights[progress.index(at)] > 0
    after = bisect(progress, at)
    return any(weight > 0 for weight in weights[max(0, after - 1) : after + 1])


def _points(source: SourceConfig) -> Points:
    where = f"data.sources[{source.name}]"
    try:
        given = {float(at): float(weight) for at, weight in source.schedule.items()}
    except ValueError as error:
        raise ConfigError(
            f"{where}: schedule={source.schedule} maps progress from 0 to 1 to weights, both numbers "
            f"({error})"
        ) from error
    schedule = given or {0.0: source.weight}
    for at, weight in schedule.items():
        if not (0 <= at <= 1 and 0 <= weight < inf):
            raise ConfigError(
                f"{where}: weight {weight} at progress {at}; weights are finite and 0 or more, progress runs "
                "from 0 (first step) to 1 (last step)"
            )
    progress = tuple(sorted(schedule))
    return progress, tuple(schedule[each] for each in progress)
