"""Orders for microbatches that visit stages in different orders: each free rank takes the best it can (pure).

The result cannot deadlock: it is the record of an execution.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from .orders import Entry
from .routes import Hop, Placement

Key = tuple[int, ...]


@dataclass(slots=True)
class _Ranks:
    """What each rank could do now."""

    admitted: int
    priority: Callable[[Entry], Key]
    ready: list[list[tuple[Key, int, Entry]]]
    free: list[float]
    under_way: int = 0
    waiting: list[tuple[float, int, int, Entry]] = field(default_factory=list)
    count: int = 0

    def later(self, time: float, rank: int, entry: Entry) -> None:
        self.count += 1
        heapq.heappush(self.waiting, (time, self.count, rank, entry))

    def arrive(self, time: float) -> None:
        while self.waiting and self.waiting[0][0] <= time:
            _, number, rank, entry = heapq.heappop(self.waiting)
            heapq.heappush(self.ready[rank], (self.priority(entry), number, entry))

    def take(self, rank: int) -> Entry | None:
        """The best entry that the limit allows."""
        held = []
        found = None
        while self.ready[rank] and found is None:
            item = heapq.heappop(self.ready[rank])
            entry = item[2]
            if entry.kind == "forward" and entry.hop == 1 and self.under_way >= self.admitted:
                held.append(item)
            else:
                found = entry
        for item in held:
            heapq.heappush(self.ready[rank], item)
        return found


def greedy(
    placement: Placement, microbatches: int, *, admitted: int, priority: Callable[[Entry], Key]
) -> list[list[Entry]]:
    """Orders of all ranks, from an execution with forwards of time 1 and backwards of time 2.

    Args:
        placement: gives the microbatches' routes.
        microbatches: number of microbatches.
        admitted: microbatches under way at a time, over the whole pipeline.
        priority: smallest first, among what a rank could do now.
    """
    ranks = range(placement.num_ranks)
    state = _Ranks(admitted=admitted, priority=priority, ready=[[] for _ in ranks], free=[0.0 for _ in ranks])
    routes = [placement.route(m) for m in range(microbatches)]
    for microbatch, route in enumerate(routes):
        state.later(0.0, route[1].rank, Entry("forward", (microbatch, 0), 1))
    lists: list[list[Entry]] = [[] for _ in ranks]
    time = 0.0
    while True:
        state.arrive(time)
        for rank in ranks:
            entry = state.take(rank) if state.free[rank] <= time else None
            if entry is not None:
                lists[rank].append(entry)
                state.free[rank] = time + (1.0 if entry.kind == "forward" else 2.0)
                _follow(state, entry, state.free[rank], routes[entry.unit[0]])
        later = [t for t in state.free if t > time] + [item[0] for item in state.waiting if item[0] > time]
        if not later:
            return lists
        time = min(later)


def _follow(state: _Ranks, entry: Entry, stop: float, route: tuple[Hop, ...]) -> None:
    """What a computation makes possible when it ends."""
    unit, hop, last = entry.unit, entry.hop, len(route) - 2
    if entry.kind == "forward":
        state.under_way += hop == 1
        following = Entry("forward", unit, hop + 1) if hop < last else Entry("backward", unit, last)
        state.later(stop, route[following.hop].rank, following)
    elif hop > 1:
        state.later(stop, route[hop - 1].rank, Entry("backward", unit, hop - 1))
    else:
        state.under_way -= 1
