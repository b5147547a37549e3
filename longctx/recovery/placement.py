"""Who keeps whose state, and which state all ranks can go back to: pure functions.

Source: Gemini (Wang et al., SOSP 2023, section 4: copies in the memory of other machines);
docs/recovery.md for the agreement.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """Steps whose complete, verified state a rank has in memory."""

    own: tuple[int, ...] = ()
    """Of itself."""
    held: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Owner -> of that rank."""

    @classmethod
    def of(cls, state: Mapping[str, object] | None) -> "Inventory":
        """From the JSON of `joined`; None: nothing."""
        if state is None:
            return cls()
        own, held = state["own"], state["held"]
        assert isinstance(own, list) and isinstance(held, dict)
        return cls(own=tuple(own), held={int(owner): tuple(steps) for owner, steps in held.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The state that the run goes back to."""

    step: int
    """Optimizer steps done in it."""
    source: tuple[int, ...]
    """For every rank the rank that has its state: itself, a holder or a twin."""


def shifts(shape: Sequence[int], *, node_ranks: int, replicas: int) -> tuple[int, ...]:
    """Rank r's state is kept by rank (r + shift) % size, for each of the shifts.

    Best first: not on a twin, which has that state anyway; on another node; not on a neighbouring
    pipeline stage (whose loss together with this one could not be averaged over); near.

    Args:
        shape: degrees of the mesh axes, `pp` and `dp_replicate` first; ranks of a stage are consecutive.
        node_ranks: ranks of one node.
        replicas: copies wanted; fewer where there are not as many other ranks.
    """
    size = math.prod(shape)
    per_stage = size // shape[0]
    ranks = np.arange(size)
    stage, node = ranks // per_stage, ranks // node_ranks
    shards = stage * size + ranks % (per_stage // shape[1])  # equal for twins

    def cost(shift: int) -> tuple[int, int, int, int]:
        useless = int(np.count_nonzero(shards == np.roll(shards, -shift)))
        same_node = int(np.count_nonzero(node == np.roll(node, -shift)))
        neighbours = int(np.count_nonzero(abs(stage - np.roll(stage, -shift)) == 1))
        return useless, same_node, neighbours, shift

    return tuple(sorted(range(1, size), key=cost)[:replicas])


def twins(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Ranks with the same shards: those that differ along dp_replicate alone.

    Args:
        shape: degrees of the mesh axes, `pp` and `dp_replicate` first.
        rank: whose.
    """
    inner = 1
    for degree in shape[2:]:
        inner *= degree
    replicas = shape[1]
    block, offset = divmod(rank, inner * replicas)
    members = (block * inner * replicas + index * inner + offset % inner for index in range(replicas))
    return tuple(member for member in members if member != rank)


def agree(inventories: Sequence[Inventory], twins_of: Sequence[Sequence[int]]) -> Agreement | None:
    """The newest step of which every rank's state exists somewhere, and where.

    Args:
        inventories: of each rank.
        twins_of: for each rank those with the same shards.

    Returns:
        None if some rank's state is gone from every memory.
    """
    steps = {step for each in inventories for step in each.own}
    steps |= {step for each in inventories for held in each.held.values() for step in held}
    for step in sorted(steps, reverse=True):
        source = [_source(rank, step, inventories, twins_of[rank]) for rank in range(len(inventories))]
        if None not in source:
            return Agreement(step=step, source=tuple(each for each in source if each is not None))
    return None


def missing(inventories: Sequence[Inventory], twins_of: Sequence[Sequence[int]]) -> list[int]:
    """Ranks of which no memory has any state."""
    steps = {step for each in inventories for step in each.own}
    steps |= {step for each in inventories for held in each.held.values() for step in held}
    ranks = range(len(inventories))
    return [r for r in ranks if all(_source(r, s, inventories, twins_of[r]) is None for s in steps)]


def _source(rank: int, step: int, inventories: Sequence[Inventory], twins_of: Sequence[int]) -> int | None:
    if step in inventories[rank].own:
        return rank
    for holder, each in enumerate(inventories):
        if step in each.held.get(rank, ()):
            return holder
    return next((twin for twin in twins_of if step in inventories[twin].own), None)
