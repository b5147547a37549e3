"""Step times with groups of one degree: what adaptive plans are measured against."""

from collections.abc import Sequence

from parallel.planner.sequence import SequenceCost


def static_ms(lengths: Sequence[int], degree: int, num_ranks: int, cost: SequenceCost) -> float:
    """Groups of one degree, filled by best fit decreasing, the slowest together in a microbatch."""
    room = cost.capacity_tokens * degree
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [own for own in bins if sum(own) + length <= room]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    loads = sorted((sum(cost.piece_ms(n, degree) for n in own) for own in bins), reverse=True)
    return sum(cost.beta_ms + load for load in loads[:: num_ranks // degree])
