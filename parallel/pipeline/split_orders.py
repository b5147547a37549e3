"""Orders of the schedules that compute the weights' gradients apart, to fill the bubble with them (pure).

F forward, I gradient of the input, W gradient of the weights, each of time 1.

Source: Zero Bubble Pipeline Parallelism (Qi et al. 2023); Pipeline Parallelism with Controllable
Memory (Qi et al. 2024), whose V places two stages on each rank.
"""

from typing import Literal

from .orders import Entry

EntryKind = Literal["forward", "backward_input", "backward_weight"]


class _List:
    """One rank's entries, stage by stage in the order of the microbatches."""

    def __init__(self, hops: tuple[int, ...], microbatches: int) -> None:
        self.entries: list[Entry] = []
        self._hops, self._microbatches = hops, microbatches
        self._done: dict[tuple[EntryKind, int], int] = {}

    def done(self, kind: EntryKind, chunk: int = 0) -> int:
        """How many of a kind there are."""
        return self._done.get((kind, chunk), 0)

    def add(self, kind: EntryKind, chunk: int = 0) -> None:
        """The next microbatch; those beyond the last only keep the order as it is."""
        microbatch = self.done(kind, chunk)
        self._done[kind, chunk] = microbatch + 1
        if microbatch < self._microbatches:
            self.entries.append(Entry(kind, (microbatch, 0), self._hops[chunk]))


def zb_h1(ranks: int, microbatches: int) -> list[list[Entry]]:
    """1F1B's memory with a third of its bubble: rank r puts W off by r microbatches.

    Takes 3 m + max(p - 1, 2 (p - 1) - (m - 1)) on p ranks with m microbatches.
    """
    lists = []
    for rank in range(ranks):
        own = _List((rank + 1,), microbatches)
        for _ in range(min(microbatches, ranks - rank)):
            own.add("forward")
        for index in range(microbatches):
            own.add("backward_input")
            if index >= rank or own.done("forward") >= microbatches:
                own.add("backward_weight")
            if own.done("forward") < microbatches:
                own.add("forward")
        while own.done("backward_weight") < microbatches:
            own.add("backward_weight")
        lists.append(own.entries)
    return lists


def zb_v(ranks: int, microbatches: int) -> list[list[Entry]]:
    """A V of two stages per rank, with 1F1B's memory and no bubble but the first rank's lead.

    Takes 6 m + max(p - 1, 4 (p - 1) - 2 (m - 1)) on p ranks with m microbatches.
    """
    whole = max(2 * ranks - 1, microbatches)
    lists = []
    for rank in range(ranks):
        own = _List((rank + 1, 2 * ranks - rank), microbatches)
        _v_warm_up(own, rank, ranks)
        while own.done("forward", 1) < own.done("forward", 0) or own.done("forward", 0) < whole:
            if own.done("forward", 0) < whole:
                own.add("forward", 0)
            _back(own, 0)
            own.add("forward", 1)
            _back(own, 1)
        for _ in range(rank):
            own.add("backward_input", 0)
            own.add("backward_input", 1)
        for _ in range(ranks - rank):
            _back(own, 0)
        for chunk in (1, 0):
            while own.done("backward_weight", chunk) < own.done("backward_input", chunk):
                own.add("backward_weight", chunk)
        lists.append(own.entries)
    return lists


def _v_warm_up(own: _List, rank: int, ranks: int) -> None:
    for _ in range(2 * (ranks - rank) - 1):
        own.add("forward", 0)
    for _ in range(rank):
        own.add("forward", 1)
        own.add("forward", 0)
    for _ in range(ranks - rank):
        own.add("forward", 1)
        _back(own, 1)


def _back(own: _List, chunk: int) -> None:
    own.add("backward_input", chunk)
    own.add("backward_weight", chunk)
