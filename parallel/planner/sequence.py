"""Which sequence groups compute a step: long pieces share many ranks, short ones do not pay for it.

Every microbatch divides all data ranks into groups of power-of-two degree; a piece belongs to one
group. Same lengths, same plan, on any machine: effort counts candidates, never time.

Source: FlexSP, sec. 4 (the problem); the search is a global pool over all microbatches instead of
FlexSP's consecutive chunks, so that short pieces fill the memory that long ones leave.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd

from ..errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCost:
    """Time and memory of pieces in groups.

    A piece of s tokens in a group of degree d takes (alpha1_ms s^2 + alpha2_ms s) / d +
    comm_ms_per_token[d] s; a microbatch takes beta_ms + its slowest group.
    """

    alpha1_ms: float
    """ms per token squared: attention."""
    alpha2_ms: float
    """ms per token: matrices."""
    beta_ms: float
    """ms per microbatch: what does not depend on tokens, such as gathering parameters."""
    comm_ms_per_token: Mapping[int, float]
    """ms per token of a piece, by degree; its keys are the degrees that may be used."""
    capacity_tokens: int
    """Tokens that one rank holds over any pp consecutive microbatches."""

    def piece_ms(self, length: int, degree: int) -> float:
        """Time of one piece in a group of a degree."""
        compute = (self.alpha1_ms * length + self.alpha2_ms) * length / degree
        return compute + self.comm_ms_per_token[degree] * length


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive data ranks that share their pieces."""

    degree: int
    """Number of ranks."""
    first_rank: int
    """First data rank, a multiple of `degree`."""
    pieces: tuple[int, ...]
    """Indices into the step's lengths; may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All microbatches of a step, the same for every rank."""

    microbatches: tuple[tuple[Group, ...], ...]
    """Groups of each microbatch, by descending degree."""
    time_ms: float
    """Predicted time: sum of the microbatches, and (pp - 1) times the slowest one."""
    lower_bound_ms: float
    """No plan is predicted to be faster than this."""


def plan_step(
    lengths: Sequence[int], *, num_ranks: int, cost: SequenceCost, pp: int = 1, effort: float = 1.0
) -> StepPlan:
    """Plan one step.

    Args:
        lengths: tokens of each piece, at least 1.
        num_ranks: data ranks.
        cost: time and memory.
        pp: pipeline stages.
        effort: scales the number of candidates that are tried.

    Raises:
        PlanError: no degree is usable, a piece counts less than one token, or one is longer than all
            memory; it names the piece's length and the longest that fits.
    """
    from .pool import fill

    degrees = usable_degrees(num_ranks, cost)
    room = cost.capacity_tokens // pp
    longest = max(lengths, default=0)
    below = next((number for number, length in enumerate(lengths) if not length >= 1), None)
    if below is not None:
        raise PlanError(
            f"piece {below} counts {lengths[below]} tokens; every piece has at least 1: leave empty pieces "
            "out, and give none a cost below 1"
        )
    if longest > room * degrees[-1]:
        raise PlanError(
            f"a piece of {longest} tokens does not fit: {degrees[-1]} ranks of {room} tokens hold at most "
            f"{room * degrees[-1]}; shorten data.seq_len, or raise capacity_tokens or the number of ranks"
        )
    microbatches = fill(lengths, num_ranks=num_ranks, cost=cost, pp=pp, effort=effort)
    times = [_microbatch_ms(groups, lengths, cost) for groups in microbatches]
    return StepPlan(
        microbatches=microbatches,
        time_ms=sum(times) + (pp - 1) * max(times),
        lower_bound_ms=lower_bound(lengths, num_ranks=num_ranks, cost=cost, pp=pp),
    )


def usable_degrees(num_ranks: int, cost: SequenceCost) -> list[int]:
    """Degrees of the cost's table that fit the ranks, ascending.

    Raises:
        PlanError: none does, a degree is no power of two, or the smallest does not divide the ranks.
    """
    odd = [d for d in cost.comm_ms_per_token if d < 1 or d & (d - 1)]
    if odd:
        raise PlanError(f"degrees {sorted(odd)} in comm_ms_per_token are no powers of two")
    degrees = sorted(d for d in cost.comm_ms_per_token if d <= num_ranks)
    if not degrees or num_ranks % degrees[0]:
        raise PlanError(
            f"degrees {sorted(cost.comm_ms_per_token)} cannot divide {num_ranks} ranks; add degree 1 to "
            "comm_ms_per_token"
        )
    return degrees


def lower_bound(lengths: Sequence[int], *, num_ranks: int, cost: SequenceCost, pp: int = 1) -> float:
    """A time in ms that no valid plan beats.

    Every piece occupies degree x time of some ranks, at least its cheapest; all ranks together offer
    num_ranks x (time - beta). No microbatch is shorter than its longest piece at its fastest degree,
    and the memory of all ranks bounds the number of microbatches from below.
    """
    if not lengths:
        return pp * cost.beta_ms
    degrees = usable_degrees(num_ranks, cost)
    work, longest_ms = 0.0, 0.0
    for length, count in Counter(lengths).items():
        fitting = [d for d in degrees if length <= cost.capacity_tokens * d]
        if not fitting:
            continue
        work += count * min(d * cost.piece_ms(length, d) for d in fitting)
        longest_ms = max(longest_ms, min(cost.piece_ms(length, d) for d in fitting))
    microbatches = ceil(sum(lengths) / (cost.capacity_tokens * num_ranks))
    total = max(work / num_ranks, longest_ms) + max(1, microbatches) * cost.beta_ms
    return total + (pp - 1) * (longest_ms + cost.beta_ms)


def validate_plan(plan: StepPlan, lengths: Sequence[int], cost: SequenceCost, *, pp: int = 1) -> None:
    """Check every rule that the training step relies on.

    Raises:
        PlanError: names the first broken rule.
    """
    if not plan.microbatches:
        raise PlanError("the plan has no microbatch")
    num_ranks = sum(group.degree for group in plan.microbatches[0])
    used: list[list[float]] = []
    seen: list[int] = []
    for number, groups in enumerate(plan.microbatches):
        used.append(_check_groups(groups, number, num_ranks, lengths, cost))
        seen += [piece for group in groups for piece in group.pieces]
    if sorted(seen) != list(range(len(lengths))):
        raise PlanError(f"{len(seen)} pieces are placed, each of {len(lengths)} must be exactly once")
    for first in range(len(used)):
        for rank in range(num_ranks):
            tokens = sum(row[rank] for row in used[first : first + pp])
            if tokens > cost.capacity_tokens:
                raise PlanError(
                    f"rank {rank} holds {tokens:.0f} tokens from microbatch {first} on, at most "
                    f"{cost.capacity_tokens} fit"
                )


def _check_groups(
    groups: Sequence[Group], number: int, num_ranks: int, lengths: Sequence[int], cost: SequenceCost
) -> list[float]:
    """Rules inside one microbatch; tokens of every rank."""
    where = f"microbatch {number}"
    tokens: list[float] = []
    degrees = [group.degree for group in groups]
    if degrees != sorted(degrees, reverse=True):
        raise PlanError(f"{where}: groups are not ordered by descending degree: {degrees}")
    for group in groups:
        if group.degree not in cost.comm_ms_per_token:
            raise PlanError(f"{where}: degree {group.degree} is not allowed")
        if group.first_rank != len(tokens) or group.first_rank % group.degree:
            raise PlanError(f"{where}: a group of degree {group.degree} starts at rank {group.first_rank}")
        tokens += [sum(lengths[p] for p in group.pieces) / group.degree] * group.degree
    if len(tokens) != num_ranks:
        raise PlanError(f"{where}: {len(tokens)} ranks are in a group, {num_ranks} must be")
    return tokens


def split_degree(degree: int, *, num_heads: int, num_kv_heads: int, node_ranks: int) -> tuple[int, int]:
    """(ring, ulysses) of a group: heads are exchanged inside a node as far as they divide evenly.

    Args:
        degree: ranks of the group.
        num_heads: query heads.
        num_kv_heads: key and value heads; fewer of them than the degree are sent more than once,
            which is still less than the ring sends inside a node.
        node_ranks: ranks of one node.
    """
    ulysses = gcd(degree, num_heads, node_ranks)
    return degree // ulysses, ulysses


def _microbatch_ms(groups: Sequence[Group], lengths: Sequence[int], cost: SequenceCost) -> float:
    return cost.beta_ms + max(
        sum(cost.piece_ms(lengths[p], group.degree) for p in group.pieces) for group in groups
    )
