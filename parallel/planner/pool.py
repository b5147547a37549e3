"""The search of the step planner: one pool of pieces, emptied microbatch by microbatch.

For a time budget the longest pieces go first, each to the place that costs the fewest rank
milliseconds: the fullest open group of some degree that has room, or a new group. What does not fit
waits. Ranks that stay free double the slowest groups. Several budgets are tried per microbatch, and
the one with the least time plus estimated rest is kept; several weights of that rest are tried too.

Compiled by numba, without the interpreter's lock: planning in a thread takes nothing from training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from .sequence import Group, SequenceCost, usable_degrees

REST_WEIGHTS = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3)
"""How much the work that a microbatch leaves over counts against it."""
BUDGETS = 20
"""Time budgets per microbatch at effort 1, from tight to loose."""
LOOSEST = 2.2
"""The loosest budget over the tightest."""
WAITS = -1
"""In place of a group: the piece is left to later microbatches."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def fill(
    lengths: Sequence[int], *, num_ranks: int, cost: SequenceCost, pp: int, effort: float
) -> tuple[tuple[Group, ...], ...]:
    """Groups of every microbatch; at least one microbatch, also without pieces."""
    room = cost.capacity_tokens // pp
    degrees = usable_degrees(num_ranks, cost)
    sizes, kind = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True)
    times = np.array(
        [[cost.piece_ms(int(n), d) if n <= room * d else np.inf for d in degrees] for n in sizes],
        dtype=np.float64,
    ).reshape(len(sizes), len(degrees))
    tables = (kind.astype(np.int64), sizes, times, np.array(degrees, dtype=np.int64))
    order = np.argsort(-sizes[kind], kind="stable").astype(np.int64)
    settings = (num_ranks, room, cost.beta_ms, pp, max(2, round(BUDGETS * effort)))
    microbatch, group, degree = _search(tables, order, settings, np.array(REST_WEIGHTS))
    return _groups(microbatch, group, degree, degrees, num_ranks)


def _groups(
    microbatch: Ints, group: Ints, degree: Ints, degrees: list[int], num_ranks: int
) -> tuple[tuple[Group, ...], ...]:
    """Groups by descending degree, so that each starts at a multiple of its degree."""
    pieces: dict[tuple[int, int], list[int]] = {}
    for piece, place in enumerate(zip(microbatch.tolist(), group.tolist(), strict=True)):
        pieces.setdefault(place, []).append(piece)
    plan = []
    for number in range(max(1, int(microbatch.max(initial=-1)) + 1)):
        found = [(degrees[int(degree[m, g])], tuple(own)) for (m, g), own in pieces.items() if m == number]
        free = num_ranks - sum(d for d, _ in found)
        for d in reversed(degrees):  # the rest of the ranks form empty groups
            found += [(d, ())] * (free // d)
            free %= d
        plan.append(_placed(sorted(found, key=lambda each: -each[0])))
    return tuple(plan)


def _placed(found: list[tuple[int, tuple[int, ...]]]) -> tuple[Group, ...]:
    placed, rank = [], 0
    for degree, own in found:
        placed.append(Group(degree, rank, own))
        rank += degree
    return tuple(placed)


@njit(cache=True)
def _search(tables: Any, order: Ints, settings: Any, weights: Floats) -> tuple[Ints, Ints, Ints]:
    """Microbatch and group of each piece, and the degree's index of each group, by the best weight."""
    ranks, n = settings[0], len(order)
    best_ms = np.inf
    best = (np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n + 1, ranks), np.int64))
    for weight in weights:
        found = (np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n + 1, ranks), np.int64))
        time = _empty_pool(tables, order.copy(), settings, weight, best_ms, found)
        if time < best_ms:
            best_ms, best = time, found
    return best


@njit(cache=True)
def _empty_pool(tables: Any, left: Ints, settings: Any, weight: float, limit: float, found: Any) -> float:
    """Microbatches until no piece is left, written to `found`; their time, infinite beyond `limit`."""
    beta_ms, pp, budgets = settings[2], settings[3], settings[4]
    total, slowest, number = 0.0, 0.0, 0
    while len(left):
        least = _fill_budget(tables, left, settings)
        score, kept_ms = np.inf, 0.0
        kept, kept_degree = np.zeros(len(left), np.int64), np.zeros(settings[0], np.int64)
        for step in range(budgets):
            budget = least * (1.0 + (LOOSEST - 1.0) * step / (budgets - 1))
            place, degree, load = _fill_one(tables, left, settings, budget)
            rest, progress = _rest_ms(tables, left, place, settings, weight)
            if progress and load.max() + rest < score:
                score, kept_ms = load.max() + rest, load.max()
                kept, kept_degree = place, degree
        total += kept_ms + beta_ms
        slowest = max(slowest, kept_ms + beta_ms)
        if total + (pp - 1) * slowest >= limit:
            return np.inf
        for i in range(len(left)):
            found[0][left[i]], found[1][left[i]] = number, kept[i]
        found[2][number] = kept_degree
        left, number = left[kept == WAITS], number + 1
    return float(total + (pp - 1) * slowest)


@njit(cache=True)
def _fill_budget(tables: Any, left: Ints, settings: Any) -> float:
    """The tightest budget: the longest piece at its fastest, or an even share of all work."""
    kind, sizes, times, degrees = tables
    ranks, room = settings[0], settings[1]
    work, tokens = 0.0, 0
    for piece in left:
        work += (times[kind[piece]] * degrees).min()
        tokens += sizes[kind[piece]]
    microbatches = -(-tokens // (room * ranks))
    return float(max(times[kind[left[0]]].min(), work / ranks / microbatches))


@njit(cache=True)
def _rest_ms(tables: Any, left: Ints, place: Ints, settings: Any, weight: float) -> tuple[float, bool]:
    """Estimated time of what waits, and whether anything does not."""
    kind, sizes, times, degrees = tables
    ranks, room, beta_ms = settings[0], settings[1], settings[2]
    work, tokens, progress = 0.0, 0, False
    for i in range(len(left)):
        if place[i] == WAITS:
            work += (times[kind[left[i]]] * degrees).min()
            tokens += sizes[kind[left[i]]]
        else:
            progress = True
    return weight * work / ranks + -(-tokens // (room * ranks)) * beta_ms, progress


@njit(cache=True)
def _fill_one(tables: Any, left: Ints, settings: Any, budget: float) -> tuple[Ints, Ints, Floats]:
    """One microbatch under a time budget: each piece's group or WAITS, degrees and loads of groups."""
    kind, sizes, times, degrees = tables
    ranks, room = settings[0], settings[1]
    place = np.full(len(left), WAITS, np.int64)
    degree, load, tokens = np.zeros(ranks, np.int64), np.zeros(ranks), np.zeros(ranks, np.int64)
    opened, free = 0, ranks
    for i in range(len(left)):
        size, time = sizes[kind[left[i]]], times[kind[left[i]]]
        group, own = WAITS, 0
        cheapest = np.inf
        for d in range(len(degrees)):
            if time[d] > budget or degrees[d] * time[d] >= cheapest:
                continue
            fullest = WAITS
            for g in range(opened):
                fits = load[g] + time[d] <= budget and tokens[g] + size <= room * degrees[d]
                if degree[g] == d and fits and (fullest == WAITS or tokens[g] > tokens[fullest]):
                    fullest = g
            if fullest != WAITS or degrees[d] <= free:
                group, own = (opened if fullest == WAITS else fullest), d
                cheapest = degrees[d] * time[d]
        if group == WAITS:
            continue
        if group == opened:
            degree[group], opened, free = own, opened + 1, free - degrees[own]
        load[group] += time[own]
        tokens[group] += size
        place[i] = group
    _widen(tables, left, place, (degree, load), (opened, free))
    return place, degree, load


@njit(cache=True)
def _widen(tables: Any, left: Ints, place: Ints, groups: Any, counts: Any) -> None:
    """Double the slowest groups while ranks are free and it helps."""
    kind, _, times, degrees = tables
    degree, load = groups
    opened, free = counts
    while opened and free:
        slowest = load[:opened].argmax()
        d = degree[slowest]
        wide = d + 1
        if wide == len(degrees) or degrees[wide] != 2 * degrees[d] or degrees[d] > free:
            return
        wider = 0.0
        for i in range(len(left)):
            if place[i] == slowest:
                wider += times[kind[left[i]], wide]
        if wider >= load[slowest]:
            return
        free -= degrees[d]
        degree[slowest], load[slowest] = wide, wider
