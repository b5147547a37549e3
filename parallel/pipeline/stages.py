"""Which layers form a stage (pure)."""

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from ..errors import ConfigError


def split_layers(
    num_layers: int,
    stage_ranks: Sequence[int],
    *,
    ends: tuple[float, float] = (0.0, 0.0),
    speeds: Sequence[float] = (),
) -> tuple[range, ...]:
    """Consecutive layers of every stage, so that the slowest rank is as fast as can be.

    Args:
        num_layers: layers of the model, which cost 1 each.
        stage_ranks: rank of each stage.
        ends: cost of the embedding, with the first stage, and of the head, with the last one.
        speeds: relative speed of each rank; none: all alike.

    Returns:
        The layers of each stage, in order, at least one each.

    Raises:
        ConfigError: more stages than layers, or speeds that do not fit the ranks.

    Source: Holmes (Yang et al. 2023): layers of a stage in proportion to its measured speed.
    """
    ranks = max(stage_ranks) + 1
    stages = len(stage_ranks)
    if stages > num_layers:
        raise ConfigError(
            f"parallel.pp={ranks} with {stages // ranks} stages each needs at least {stages} layers, but "
            f"model.num_layers={num_layers}; set parallel.pp={max(1, num_layers // (stages // ranks))}"
        )
    speeds = list(speeds) or [1.0] * ranks
    if len(speeds) != ranks or not all(0 < speed < inf for speed in speeds):
        raise ConfigError(
            f"pipeline.speeds={speeds}; give a positive relative speed for each of parallel.pp={ranks} ranks"
        )
    load = [0.0] * ranks
    load[stage_ranks[0]] += ends[0]
    load[stage_ranks[-1]] += ends[1]
    counts = [1] * stages
    for rank in stage_ranks:
        load[rank] += 1.0
    for _ in range(num_layers - stages):
        # Every layer costs the same, so giving each to the rank that ends earliest with it is optimal;
        # of equal ranks the last takes it, since earlier stages keep more microbatches in memory.
        best = min(reversed(range(ranks)), key=lambda rank: (load[rank] + 1.0) / speeds[rank])
        load[best] += 1.0
        own = [stage for stage, rank in enumerate(stage_ranks) if rank == best]
        counts[min(own, key=lambda stage: counts[stage])] += 1
    stops = list(accumulate(counts))
    return tuple(range(stop - count, stop) for stop, count in zip(stops, counts, strict=True))


def equal_layers(num_layers: int, stage_ranks: Sequence[int]) -> tuple[range, ...]:
    """The same number of layers for every stage; what is left over goes to the last stages."""
    return split_layers(num_layers, stage_ranks)
