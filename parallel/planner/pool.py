"""The search of the step planner: one pool of pieces, emptied microbatch by microbatch.

For a time budget the longest pieces go first, each to the place that costs the fewest rank
milliseconds: the least loaded open group of some degree, or a new group. What does not fit waits.
Ranks that stay free double the slowest groups. Several budgets are tried per microbatch, and the
one with the least time plus estimated rest is kept; several weights of that rest are tried too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from .sequence import Group, SequenceCost, usable_degrees

REST_WEIGHTS = (1.0, 1.06, 1.15)
"""How much the work that a microbatch leaves over counts against it."""
BUDGETS = 14
"""Time budgets per microbatch at effort 1, from tight to loose."""


@dataclass(slots=True)
class _Open:
    """A group that is being filled."""

    degree: int
    number: int = 0
    """Order of opening; breaks ties, so that the plan is the same everywhere."""
    load_ms: float = 0.0
    tokens: int = 0
    pieces: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """What every microbatch of a step shares."""

    lengths: Sequence[int]
    num_ranks: int
    degrees: list[int]
    room: int
    """Tokens that a rank holds in one microbatch."""
    times: dict[tuple[int, int], float]
    """ms by (length, degree)."""
    cheapest: dict[int, float]
    """Fewest rank ms by length."""
    beta_ms: float


def fill(
    lengths: Sequence[int], *, num_ranks: int, cost: SequenceCost, room: int, effort: float
) -> tuple[tuple[Group, ...], ...]:
    """Groups of every microbatch; at least one microbatch, also without pieces."""
    pool = _make_pool(lengths, num_ranks, cost, room)
    order = sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece))
    plans = [_empty_pool(pool, order, weight, max(2, round(BUDGETS * effort))) for weight in REST_WEIGHTS]
    best = min(plans, key=lambda plan: sum(_slowest(groups) + pool.beta_ms for groups in plan))
    return tuple(_placed(groups) for groups in best)


def _make_pool(lengths: Sequence[int], num_ranks: int, cost: SequenceCost, room: int) -> _Pool:
    degrees = usable_degrees(num_ranks, cost)
    times = {(n, d): cost.piece_ms(n, d) for n in set(lengths) for d in degrees if n <= room * d}
    cheapest = {n: min(d * times[n, d] for d in degrees if (n, d) in times) for n in set(lengths)}
    return _Pool(
        lengths=lengths,
        num_ranks=num_ranks,
        degrees=degrees,
        room=room,
        times=times,
        cheapest=cheapest,
        beta_ms=cost.beta_ms,
    )


def _empty_pool(pool: _Pool, order: list[int], weight: float, budgets: int) -> list[list[_Open]]:
    """Microbatches until no piece is left."""
    plan: list[list[_Open]] = []
    left = order
    while left or not plan:
        tries = [_fill_one(pool, left, budget) for budget in _budgets(pool, left, budgets)]
        groups, left = min(tries, key=lambda attempt: _score(pool, *attempt, weight=weight))
        plan.append(groups)
    return plan


def _budgets(pool: _Pool, left: Sequence[int], count: int) -> Iterator[float]:
    """From the least time in which anything fits, up to all the work at once."""
    if not left:
        yield 0.0
        return
    longest = pool.lengths[left[0]]
    least = min(pool.times[longest, d] for d in pool.degrees if (longest, d) in pool.times)
    work = sum(pool.cheapest[pool.lengths[piece]] for piece in left) / pool.num_ranks
    tokens = sum(pool.lengths[piece] for piece in left)
    microbatches = -(-tokens // (pool.room * pool.num_ranks))
    for step in range(count):
        yield max(least, work / microbatches) * (1 + 1.2 * step / max(1, count - 1))


def _fill_one(pool: _Pool, left: Sequence[int], budget: float) -> tuple[list[_Open], list[int]]:
    """One microbatch under a time budget, and the pieces that wait."""
    heaps: dict[int, list[tuple[float, int, _Open]]] = {degree: [] for degree in pool.degrees}
    groups: list[_Open] = []
    free, waiting = pool.num_ranks, []
    for piece in left:
        length = pool.lengths[piece]
        place = _best_place(pool, heaps, length, free, budget)
        if place is None:
            waiting.append(piece)
            continue
        degree, group = place
        if group is None:
            group = _Open(degree, number=len(groups))
            groups.append(group)
            free -= degree
        else:
            heappop(heaps[degree])
        group.load_ms += pool.times[length, degree]
        group.tokens += length
        group.pieces.append(piece)
        heappush(heaps[degree], (group.load_ms, group.number, group))
    _use_free(pool, groups, free)
    return groups, waiting


def _best_place(
    pool: _Pool, heaps: dict[int, list[tuple[float, int, _Open]]], length: int, free: int, budget: float
) -> tuple[int, _Open | None] | None:
    """The degree and open group (None: a new one) with the fewest rank ms, or None: it must wait."""
    best: tuple[int, _Open | None] | None = None
    best_cost = float("inf")
    for degree in pool.degrees:
        time = pool.times.get((length, degree))
        if time is None or time > budget or degree * time >= best_cost:
            continue
        heap = heaps[degree]
        # The least loaded group is the one to try; if its memory is full, a new group may serve.
        opened = heap[0][2] if heap else None
        if (
            opened is not None
            and opened.load_ms + time <= budget
            and opened.tokens + length <= pool.room * degree
        ):
            best, best_cost = (degree, opened), degree * time
        elif degree <= free:
            best, best_cost = (degree, None), degree * time
    return best


def _use_free(pool: _Pool, groups: list[_Open], free: int) -> None:
    """Double the slowest groups while ranks are free; the rest of the ranks form empty groups."""
    while groups and free:
        slowest = max(groups, key=lambda group: group.load_ms)
        wider = slowest.degree * 2
        if wider not in pool.degrees or slowest.degree > free:
            break
        load = sum(pool.times[pool.lengths[piece], wider] for piece in slowest.pieces)
        if load >= slowest.load_ms:
            break
        free -= slowest.degree
        slowest.degree, slowest.load_ms = wider, load
    for degree in reversed(pool.degrees):
        while free >= degree:
            groups.append(_Open(degree))
            free -= degree


def _score(pool: _Pool, groups: list[_Open], waiting: list[int], *, weight: float) -> float:
    """Time of the microbatch and, estimated, of what it leaves over; infinite without progress."""
    if waiting and not any(group.pieces for group in groups):
        return float("inf")
    work = sum(pool.cheapest[pool.lengths[piece]] for piece in waiting)
    tokens = sum(pool.lengths[piece] for piece in waiting)
    microbatches = -(-tokens // (pool.room * pool.num_ranks))
    rest = weight * work / pool.num_ranks + microbatches * pool.beta_ms
    return _slowest(groups) + pool.beta_ms + rest


def _slowest(groups: Sequence[_Open]) -> float:
    return max(group.load_ms for group in groups)


def _placed(groups: list[_Open]) -> tuple[Group, ...]:
    """Groups by descending degree, so that each starts at a multiple of its degree."""
    placed, rank = [], 0
    for group in sorted(groups, key=lambda group: -group.degree):
        placed.append(Group(group.degree, rank, tuple(sorted(group.pieces))))
        rank += group.degree
    return tuple(placed)
