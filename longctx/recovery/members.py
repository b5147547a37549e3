"""Where a training run gets its worlds from, whether lost ranks are replaced or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..build import Run, World
from ..config.schema import Config
from ..pulse import Pulse
from .generations import Shelf
from .keeper import Keeper

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What a membership began with."""

    step: int
    """Optimizer steps done."""
    row: Row | None
    """Rank 0: metrics of that step, which may not have been written yet."""
    event: Row
    """What there is to say about the recovery."""


class Members(Protocol):
    """Where a run gets its worlds from."""

    pulse: Pulse
    """What this rank is doing."""
    rank: int
    """This rank, the same in every world."""
    replaces: bool
    """Whether this process takes the place of one that was lost."""
    restarted: bool
    """Whether torchrun has started the job again, which then resumes."""

    def form(self, config: Config) -> World:
        """The next world; the run is built on it."""

    def known(self) -> Mapping[str, torch.Tensor] | None:
        """Shards to build with: none at all where state will be restored, None to initialize."""

    def restore(self, run: Run) -> Restored | None:
        """Put the state that all ranks agree on into a run; None: there is none yet."""

    def begin(self, run: Run) -> None:
        """Steps are computed from here on."""

    def behind(self) -> bool:
        """Whether this rank still waits for what it keeps of the last generation."""

    def keep(self, run: Run, row: Row, *, behind: bool) -> None:
        """Remember the state after a step; `behind` is true if any rank is."""

    def older(self, run: Run) -> bool:
        """Whether every rank's memory has a state before the newest; all ranks call it."""

    def go_back(self, run: Run, *, further: bool) -> None:
        """Restore the newest state, or the one before, after a loss spike; all ranks call it."""

    def survives(self, error: BaseException) -> bool:
        """Whether the run goes on after an error, in another world."""

    def close(self) -> None:
        """Let go of the present world."""

    def fail(self, exit_code: int, error: str) -> None:
        """Tell people and the other ranks why this one ends."""

    def end(self, exit_code: int) -> bool:
        """Whether all ranks have come to the end; if not, another world forms."""


class Fixed:
    """A world in which a lost rank is an error."""

    def __init__(self, world: World) -> None:
        self._world, self.rank, self.pulse, self.replaces = world, world.rank, Pulse(), False
        self.restarted = False
        self._shelf, self._remembers = Shelf(), False
        self._keeper = Keeper(self._shelf)

    def form(self, config: Config) -> World:
        """The world."""
        return self._world

    def known(self) -> None:
        """Nothing."""

    def restore(self, run: Run) -> None:
        """Nothing."""

    def begin(self, run: Run) -> None:
        """Remember the state that the run begins with, where a spike may ask for it."""
        self._remembers = run.config.train.on_spike == "rewind"
        self.keep(run, {}, behind=False)

    def behind(self) -> bool:
        """Never."""
        return False

    def keep(self, run: Run, row: Row, *, behind: bool) -> None:
        """In this process alone, where a spike may ask for it."""
        if self._remembers:
            self._keeper.pack(run, row)

    def older(self, run: Run) -> bool:
        """Whether there is a state before the newest: on all ranks alike, they keep the same steps."""
        return self._shelf.count() > 1

    def go_back(self, run: Run, *, further: bool) -> None:
        """Restore the newest state, or the one before."""
        self._keeper.go_back(run, further=further)

    def survives(self, error: BaseException) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing."""

    def fail(self, exit_code: int, error: str) -> None:
        """Rank 0 speaks; all ranks have the same error, or the launcher tells the others'."""
        if self.rank == 0:
            print(f"error: {error}", flush=True)

    def end(self, exit_code: int) -> bool:
        """Always."""
        return True
