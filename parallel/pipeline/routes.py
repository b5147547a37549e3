"""Where the parts of a model live, and the way of each microbatch through them (pure).

A part is "embed", a stage (a number, in the model's order) or "head". A microbatch visits one part
per hop; backward goes through the same hops from the last to the first.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Part = int | Literal["embed", "head"]
"""A stage by its number, or what comes before the first and behind the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One visit of a microbatch."""

    part: Part
    """What is computed."""
    rank: int
    """Where, on the pp axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which rank hosts which stage, and in which order microbatches visit them."""

    stage_ranks: tuple[int, ...]
    """Rank of each stage."""
    swap_ends: bool = False
    """Odd microbatches visit the first two and the last two stages in swapped order."""

    @property
    def num_ranks(self) -> int:
        """Ranks on the pp axis."""
        return max(self.stage_ranks) + 1

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return len(self.stage_ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that a rank hosts."""
        return tuple(stage for stage, host in enumerate(self.stage_ranks) if host == rank)

    def order(self, microbatch: int) -> tuple[int, ...]:
        """Stages in the order in which a microbatch visits them."""
        stages = list(range(self.num_stages))
        if self.swap_ends and microbatch % 2:
            stages[:2], stages[-2:] = stages[1::-1], stages[:-3:-1]
        return tuple(stages)

    def route(self, microbatch: int) -> tuple[Hop, ...]:
        """The hops of a microbatch: embed, its stages, head; both ends on the rank beside them."""
        stages = [Hop(part=stage, rank=self.stage_ranks[stage]) for stage in self.order(microbatch)]
        return (Hop(part="embed", rank=stages[0].rank), *stages, Hop(part="head", rank=stages[-1].rank))

    def hosts(self, part: Part) -> tuple[int, ...]:
        """Ranks that hold a part's parameters; several hold replicas, whose gradients are summed."""
        routes = [self.route(microbatch) for microbatch in range(2)]
        return tuple(sorted({hop.rank for route in routes for hop in route if hop.part == part}))

    def links(self) -> list[tuple[int, int]]:
        """(sender, receiver) pairs, each way of every boundary that any microbatch crosses, in one order."""
        pairs = set()
        for microbatch in range(2):
            for left, right in pairwise(self.route(microbatch)):
                if left.rank != right.rank:
                    pairs |= {(left.rank, right.rank), (right.rank, left.rank)}
        return sorted(pairs)


def looped(num_ranks: int, chunks: int) -> Placement:
    """`chunks` stages per rank: stage s on rank s modulo the number of ranks."""
    return Placement(stage_ranks=tuple(range(num_ranks)) * chunks)


def folded(num_ranks: int) -> Placement:
    """Two stages per rank, the second half on the way back: a V, with both ends on rank 0."""
    down = tuple(range(num_ranks))
    return Placement(stage_ranks=down + down[::-1])
