"""Who communicates, and communication under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .counter import Counter
from .errors import PeerLost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Ranks that communicate along one mesh axis, as seen by one of them."""

    axis: str
    """Name of the axis, for messages."""
    rank: int
    """This process's index in `ranks`."""
    ranks: tuple[int, ...]
    """Global ranks, in the axis' order."""
    handle: Any = None
    """torch.distributed ProcessGroup; None when the group has one rank."""
    counter: Counter = field(default_factory=Counter)
    """Where calls and bytes are counted."""
    warmed: list[bool] = field(default_factory=list)
    """Not empty once `warm_up` has run."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


class Pending:
    """Communication under way; `wait` returns when its buffers may be used."""

    __slots__ = ("_after", "_group", "_keep", "_kind", "_step", "_works")

    def __init__(self, group: Group, kind: str, step: int | None) -> None:
        self._group, self._kind, self._step = group, kind, step
        self._works: list[tuple[int | None, Any]] = []
        self._after: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._keep: list[torch.Tensor] = []

    def done(self) -> bool:
        """Whether every part has ended, without waiting; its buffers are then released by `wait`."""
        return all(work.is_completed() for _, work in self._works)

    def wait(self) -> None:
        """Wait for every part.

        Raises:
            PeerLost: a peer did not answer within the group's timeout, or closed its connection.
        """
        works, self._works = self._works, []
        for peer, work in works:
            with naming(self._group, self._kind, peer=peer, step=self._step):
                work.wait()
        for target, staged in self._after:
            target.copy_(staged)
        self._after, self._keep = [], []


@contextmanager
def naming(group: Group, kind: str, *, peer: int | None = None, step: int | None = None) -> Iterator[None]:
    """Turn a backend's error into `PeerLost`; `peer` is an index into the group, if it is known."""
    try:
        yield
    except RuntimeError as error:
        rank = None if peer is None else group.ranks[peer]
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        detail = f"{kind} among ranks {list(group.ranks)} failed ({words})"
        raise PeerLost(axis=group.axis, rank=rank, step=step, detail=detail) from error
