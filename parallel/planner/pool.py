"""The search of the step planner: one pool of pieces, emptied microbatch by microbatch.

For a time budget the longest pieces go first, each to the place that costs the fewest rank
milliseconds: the fullest open group of some degree that has room, or a new group. What does not fit
waits. Ranks that stay free double the slowest groups. Several budgets are tried per microbatch, and
the one with the least time plus estimated rest is kept; several weights of that rest are tried too, and
several expectations of how full later microbatches get, since a rest that just fits rarely does. The same
is tried without the smallest degrees and with each degree alone.

Compiled by numba, without the interpreter's lock: planning in a thread takes nothing from training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from .sequence import Group, SequenceCost, usable_degrees

REST_WEIGHTS = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3)
"""How much the work that a microbatch leaves over counts against it."""
BUDGETS, FEWER = 20, 2
"""Time budgets per microbatch at effort 1, tight to loose; and for a part of the degrees in large steps."""
LOOSEST = 2.2
"""The loosest budget over the tightest."""
FILLED = (1.0, 0.98, 0.93)
"""Share of the memory that later microbatches are expected to fill."""
FILLS = 24
"""Other weights and shares are tried until so many times the step's pieces were placed, at effort 1."""
SMALL = 4096
"""Pieces times ranks up to which every window of degrees is searched as long as all of them together."""
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
    kind = kind.astype(np.int64)
    times = np.array(
        [[cost.piece_ms(int(n), d) if n <= room * d else np.inf for d in degrees] for n in sizes],
        dtype=np.float64,
    ).reshape(len(sizes), len(degrees))
    order = np.argsort(-sizes[kind], kind="stable").astype(np.int64)
    best_ms, best = np.inf, []
    for allowed in _windows(times):
        thorough = bool(allowed.all()) or len(order) * num_ranks <= SMALL
        budgets = max(2, round((BUDGETS if thorough else FEWER) * effort))
        tables = (kind, sizes, np.where(allowed, times, np.inf), np.array(degrees, dtype=np.int64))
        search = _Search(tables, num_ranks, room, budgets)
        for filled, weight in product(FILLED, REST_WEIGHTS):
            rest = _Rest(weight / num_ranks, filled * room * num_ranks, cost.beta_ms)
            time_ms, found = search.empty_pool(order, rest, pp=pp, limit_ms=best_ms)
            if time_ms < best_ms:
                best_ms, best = time_ms, found
            if search.pieces > (FILLS * effort * len(order) if thorough else 0):
                break  # counted, not timed: the same on every machine
    return tuple(_groups(each, degrees, num_ranks) for each in best) or (_groups(None, degrees, num_ranks),)


def _windows(times: Floats) -> Iterator[npt.NDArray[np.bool_]]:
    """Degrees to choose among: all of them, all but the smallest few, one alone.

    A piece goes where it costs the fewest rank milliseconds, which is a small degree; with a budget to
    spare that leaves ranks idle, and wider groups, or all of one size, are then the better choice.
    """
    index = np.arange(times.shape[1])
    yield index >= 0
    for degree in index:
        if degree > 0:
            yield index >= degree
        alone = index == degree
        if np.isfinite(times[:, alone]).all() and len(index) > 1 and degree < index[-1]:
            yield alone


@dataclass(frozen=True, slots=True)
class _Rest:
    """How what a microbatch leaves over counts against it."""

    weight: float
    """ms of time per rank ms of work."""
    tokens: float
    """Tokens that a later microbatch is expected to hold."""
    beta_ms: float
    """ms of a later microbatch."""


@dataclass(frozen=True, slots=True)
class _Filled:
    """One microbatch: pieces, the group of each or WAITS, and the groups' degrees by index."""

    pieces: Ints
    place: Ints
    degree: Ints


@dataclass(frozen=True, slots=True)
class _Choices:
    """What one microbatch may hold of some pieces, by time budget."""

    place: Ints
    """[budgets, pieces]: group, or WAITS."""
    degree: Ints
    """[budgets, ranks]: index of each group's degree."""
    slowest_ms: Floats
    """[budgets]."""
    work: Floats
    """[budgets]: rank ms of the pieces that wait, at the least."""
    tokens: Ints
    """[budgets]: of the pieces that wait."""


class _Search:
    """Choices for sets of pieces, each computed once: most weights of the rest lead to the same sets."""

    def __init__(self, tables: Any, ranks: int, room: int, budgets: int) -> None:
        self._tables, self._settings = tables, (ranks, room, budgets)
        self._known: dict[bytes, _Choices] = {}
        self.pieces = 0
        """Pieces of the sets so far, each of which is placed under every budget."""

    def empty_pool(self, left: Ints, rest: _Rest, *, pp: int, limit_ms: float) -> tuple[float, list[_Filled]]:
        """Microbatches until no piece is left, and their time; infinite from `limit_ms` on."""
        found: list[_Filled] = []
        total = slowest = 0.0
        while len(left):
            choices = self._choices(left)
            later = np.ceil(choices.tokens / rest.tokens) * rest.beta_ms
            score = choices.slowest_ms + rest.weight * choices.work + later
            best = int(score.argmin())
            time_ms = float(choices.slowest_ms[best]) + rest.beta_ms
            total, slowest = total + time_ms, max(slowest, time_ms)
            if total + (pp - 1) * slowest >= limit_ms:
                return np.inf, []
            found.append(_Filled(left, choices.place[best], choices.degree[best]))
            left = left[choices.place[best] == WAITS]
        return total + (pp - 1) * slowest, found

    def _choices(self, left: Ints) -> _Choices:
        key = left.tobytes()
        if key not in self._known:
            self.pieces += len(left)
            self._known[key] = _Choices(*_fill_budgets(self._tables, left, self._settings))
        return self._known[key]


def _groups(filled: _Filled | None, degrees: list[int], num_ranks: int) -> tuple[Group, ...]:
    """Groups by descending degree, so that each starts at a multiple of its degree."""
    pieces: dict[int, list[int]] = {}
    if filled is not None:
        for piece, group in zip(filled.pieces.tolist(), filled.place.tolist(), strict=True):
            if group != WAITS:
                pieces.setdefault(group, []).append(piece)
    found = [(degrees[int(filled.degree[g])], tuple(own)) for g, own in pieces.items()] if filled else []
    free = num_ranks - sum(d for d, _ in found)
    for d in reversed(degrees):  # the rest of the ranks form empty groups
        found += [(d, ())] * (free // d)
        free %= d
    return _placed(sorted(found, key=lambda each: -each[0]))


def _placed(found: list[tuple[int, tuple[int, ...]]]) -> tuple[Group, ...]:
    placed, rank = [], 0
    for degree, own in found:
        placed.append(Group(degree, rank, own))
        rank += degree
    return tuple(placed)


@njit(cache=True, nogil=True)
def _fill_budgets(tables: Any, left: Ints, settings: Any) -> tuple[Ints, Ints, Floats, Floats, Ints]:
    """What one microbatch holds under each budget; see `_Choices`. What places nothing takes for ever."""
    kind, sizes, times, degrees = tables
    ranks, room, budgets = settings
    places, groups = np.zeros((budgets, len(left)), np.int64), np.zeros((budgets, ranks), np.int64)
    slowest, work = np.full(budgets, np.inf), np.zeros(budgets)
    tokens = np.zeros(budgets, np.int64)
    least = _fill_budget(tables, left, ranks, room)
    for step in range(budgets):
        budget = least * (1.0 + (LOOSEST - 1.0) * step / (budgets - 1))
        place, degree, load = _fill_one(tables, left, ranks, room, budget)
        for i in range(len(left)):
            if place[i] == WAITS:
                work[step] += (times[kind[left[i]]] * degrees).min()
                tokens[step] += sizes[kind[left[i]]]
            else:
                slowest[step] = load.max()
        places[step], groups[step] = place, degree
    return places, groups, slowest, work, tokens


@njit(cache=True, nogil=True)
def _fill_budget(tables: Any, left: Ints, ranks: int, room: int) -> float:
    """The tightest budget: the longest piece at its fastest, or an even share of all work."""
    kind, sizes, times, degrees = tables
    work, tokens = 0.0, 0
    for piece in left:
        work += (times[kind[piece]] * degrees).min()
        tokens += sizes[kind[piece]]
    microbatches = -(-tokens // (room * ranks))
    return float(max(times[kind[left[0]]].min(), work / ranks / microbatches))


@njit(cache=True, nogil=True)
def _fill_one(tables: Any, left: Ints, ranks: int, room: int, budget: float) -> tuple[Ints, Ints, Floats]:
    """One microbatch under a time budget: each piece's group or WAITS, degrees and loads of groups."""
    kind, sizes, times, degrees = tables
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


@njit(cache=True, nogil=True)
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
