"""How many pieces of each bucket a step draws: a pure function of (seed, step).

A bucket is one source's pieces of one length. Two rules make a step:

1. *Shares*: the tokens that each bucket should give to this step, real numbers that add up to the step's
   constant budget. Sources divide it by their weights of the step. Inside a source `natural`, `uniform`
   and `weights` have fixed shares; `grow-*` and `shrink-*` divide the run into cycles, give each bucket
   its natural share of what the source gives in a cycle, and take from it in proportion to that share
   times odds that favour short (grow) or long (shrink) pieces until it is used up, so that lengths move
   inside a cycle.
2. *Rounding*: whole pieces are drawn so that a step has exactly its budget, and what a bucket is owed
   is remembered, so that shares over many steps are those of rule 1 to within a few pieces.

Any step is reached by replaying counts, without reading a token.

Source: Pouransari et al., "Dataset decomposition", NeurIPS 2024, section 2.2 and its table of odds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import OutOfData
from .expected import Expected
from .index import Int64s
from .packing import Floats
from .rounding import draw_mixed, draw_one_class, water_fill

Kind = Literal[
    "natural",
    "uniform",
    "weights",
    "grow-linear",
    "grow-p2",
    "grow-p100",
    "shrink-linear",
    "shrink-p2",
    "shrink-p100",
]
Mode = Literal["mixed", "one_bucket"]
_SNAPSHOT = 256

_ODDS: Mapping[str, Callable[[int], float]] = {
    "linear": lambda rank: rank + 1.0,
    "p2": lambda rank: 2.0**rank,
    "p100": lambda rank: 100.0**rank,
}
"""Odds of a class against the least likely one, which has rank 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """What there is to draw, as columns."""

    source: Int64s
    """int64 [b]: number of the source."""
    length: Int64s
    """int64 [b]: tokens of each piece, a power of two."""
    pieces: Int64s
    """int64 [b]: pieces in one epoch, at least one."""
    limit: Int64s
    """int64 [b]: pieces that may be drawn over the whole run (`max_epochs`)."""

    @property
    def tokens(self) -> Int64s:
        """int64 [b]: tokens of one epoch."""
        return self.pieces * self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the user asks for."""

    kind: Kind = "natural"
    """Rule of the shares."""
    mode: Mode = "mixed"
    """`mixed`: every step has pieces of all classes (FlexSP); `one_bucket`: of one length (Apple)."""
    cycles: int = 1
    """grow-*, shrink-*: times that lengths go through their range in the run."""
    class_weights: Mapping[int, float] = field(default_factory=dict)
    """weights: length class -> share of the tokens, up to a factor; classes not named get none."""
    bucket_weights: Floats | None = None
    """float64 [b]: factor on each bucket's share inside its source; None: ones."""
    source_weights: Callable[[int], Sequence[float]] = lambda step: (1.0,)
    """Weight of each source's tokens in a step, up to a factor."""
    source_names: tuple[str, ...] = ("data",)
    """Names, for messages."""


@dataclass(slots=True)
class _State:
    """Where the replay stands, before `step` is drawn."""

    step: int
    drawn: Int64s  # [b] pieces so far
    owed: Floats  # [b] tokens that rounding still owes; sums to 0
    quota: Floats  # [b] tokens of the cycle
    left: Floats  # [b] tokens left of them
    inside: Floats  # [b] shares inside the source at the cycle's start

    def copy(self) -> "_State":
        floats = (column.copy() for column in (self.owed, self.quota, self.left, self.inside))
        return _State(self.step, self.drawn.copy(), *floats)


class Curriculum:
    """Counts of pieces for any step in any order.

    Args:
        buckets: what there is.
        wanted: what is asked for.
        seed: of the class that a `one_bucket` step takes.
        step_tokens: tokens of every step, a multiple of the longest piece.
        steps: of the run; later steps go on with cycles of the same size.
    """

    def __init__(
        self, buckets: Buckets, wanted: Wanted, *, seed: int, step_tokens: int, steps: int = 1
    ) -> None:
        self.buckets, self.wanted = buckets, wanted
        self._seed, self._budget = seed, step_tokens
        self._steps, self._cycles = max(1, steps), max(1, min(wanted.cycles, steps))
        self._odds = _odds(buckets, wanted.kind)
        self._fixed = _fixed_shares(buckets, wanted)
        self._sources, self._expected = len(wanted.source_names), Expected(wanted.source_weights)
        none = np.zeros(len(buckets.length))
        self._state = _State(0, none.astype(np.int64), none, none, none, none).copy()
        self._snapshots: dict[int, _State] = {0: self._state.copy()}

    def draw(self, step: int) -> tuple[Int64s, Int64s]:
        """Pieces of each bucket.

        Args:
            step: number of the step, from 0.

        Returns:
            int64 [b] drawn before the step, int64 [b] drawn in it.

        Raises:
            OutOfData: nothing is left to draw, naming the sources.
        """
        self._seek(step)
        before = self._state.drawn.copy()
        self._advance()
        return before, self._state.drawn - before

    def exhausted(self, step: int) -> list[str]:
        """Sources of which nothing may be drawn any more before a step."""
        self._seek(step)
        left = self.buckets.limit > self._state.drawn
        return [
            name
            for number, name in enumerate(self.wanted.source_names)
            if (self.buckets.source == number).any() and not left[self.buckets.source == number].any()
        ]

    def forget(self, step: int) -> None:
        """Replay `step` and later ones anew: the source weights from there on have changed."""
        self._expected.forget()
        self._snapshots = {s: kept for s, kept in self._snapshots.items() if s <= step}
        if self._state.step > step:
            self._state = self._snapshots[max(self._snapshots)].copy()

    def _seek(self, step: int) -> None:
        if step < self._state.step or step - self._state.step > _SNAPSHOT:
            nearest = max(s for s in self._snapshots if s <= step)
            if step < self._state.step or nearest > self._state.step:
                self._state = self._snapshots[nearest].copy()
        while self._state.step < step:
            self._advance()

    def _advance(self) -> None:
        state, lengths = self._state, self.buckets.length
        available = self.buckets.limit - state.drawn
        wanted = (self._fixed > 0) & (self._weights(state.step) > 0)[self.buckets.source]
        open_ = np.where(wanted, available, 0)  # a weight of 0 gives nothing, whatever limits ask of others
        state.owed += self._shares(state, open_, available)
        if self.wanted.mode == "mixed":
            counts = draw_mixed(state.owed, lengths, open_, self._budget)
        else:
            counts = draw_one_class(state.owed, lengths, open_, self._budget, key=(self._seed, state.step))
        if int(counts @ lengths) != self._budget:
            raise OutOfData(self._spent(state.step))
        state.owed -= counts * lengths
        state.drawn = state.drawn + counts
        state.step += 1
        if state.step % _SNAPSHOT == 0:
            self._snapshots.setdefault(state.step, state.copy())

    def _shares(self, state: _State, open_: Int64s, available: Int64s) -> Floats:
        """Tokens that each bucket should give to this step; they add up to the budget.

        The sources divide the budget by their weights of this step, and each divides its part over its
        lengths. What limits take from a length goes to the source's others, then to other sources.
        """
        source, usable = self.buckets.source, self._usable(open_)
        caps = np.where(usable, open_ * self.buckets.length.astype(np.float64), 0.0)
        inside = self._inside(usable)
        room = self._of_sources(np.where(inside > 0, caps, 0.0))
        parts = water_fill(self._weights(state.step), room, self._budget)
        if parts is None:
            raise OutOfData(self._spent(state.step))
        if self._odds is None:
            return self._divided(parts, inside, caps)
        self._foresee(state, available)
        quota, left = state.quota.clip(min=0.0) * self._odds, np.minimum(state.left.clip(min=0.0), caps)
        shares = np.zeros(len(caps))
        for number, part in enumerate(parts):
            own = source == number
            filled = water_fill(quota[own], left[own], part)
            if filled is None:  # limits leave less than the cycle wants: take from what there is
                filled = self._divided(parts, inside, caps)[own]
            shares[own] = filled
        state.left = state.left - shares
        return shares

    def _foresee(self, state: _State, available: Int64s) -> None:
        """Let quotas add up to what each source is expected to give until the end of the cycle.

        Without a change in weights or sources that is so from the cycle's first step.
        """
        span, usable = self._cycle(state.step), self._usable(available)
        if state.step == span[0]:
            state.inside, state.quota = self._inside(usable), state.left
        live = self._of_sources(self._fixed * usable) > 0
        held = self._of_sources(state.left)
        missing = self._expected.rest(state.step, span, live) * self._budget - held
        missing[np.abs(missing) < 1e-6 * self._budget] = 0.0  # rounding of sums
        more = state.inside * missing[self.buckets.source]
        state.quota, state.left = state.quota + more, state.left + more

    def _divided(self, parts: Floats, inside: Floats, caps: Floats) -> Floats:
        """Each source's part over its buckets, by their shares inside it."""
        shares = np.zeros(len(caps))
        for number, part in enumerate(parts):
            own = self.buckets.source == number
            filled = water_fill(inside[own], caps[own], part)
            shares[own] = 0.0 if filled is None else filled  # a part is within its source's caps
        return shares

    def _inside(self, usable: npt.NDArray[np.bool_]) -> Floats:
        """float64 [b]: shares of buckets inside their source."""
        wanted = self._fixed * usable
        totals = self._of_sources(wanted)
        scale = np.divide(1.0, totals, out=np.zeros(len(totals)), where=totals > 0)
        inside: Floats = wanted * scale[self.buckets.source]
        return inside

    def _of_sources(self, column: Floats) -> Floats:
        """float64 [sources]: sums of a column over each source's buckets."""
        sums = np.bincount(self.buckets.source, weights=column, minlength=self._sources)
        return sums.astype(np.float64)

    def _weights(self, step: int) -> Floats:
        return np.asarray(self.wanted.source_weights(step), dtype=np.float64)

    def _usable(self, available: Int64s) -> npt.NDArray[np.bool_]:
        """Buckets that a step can take from; in one_bucket mode a class must fill the whole step."""
        if self.wanted.mode == "mixed":
            return available > 0
        lengths = self.buckets.length
        total = {int(k): int((available * lengths)[lengths == k].sum()) for k in np.unique(lengths)}
        full = np.array([total[int(k)] >= self._budget for k in lengths])
        usable: npt.NDArray[np.bool_] = (available > 0) & full
        return usable

    def _cycle(self, step: int) -> tuple[int, int]:
        """First step of the cycle that holds `step`, and of the next one."""
        turn = step * self._cycles // self._steps
        while turn * self._steps // self._cycles > step:
            turn -= 1
        while (turn + 1) * self._steps // self._cycles <= step:
            turn += 1
        return turn * self._steps // self._cycles, (turn + 1) * self._steps // self._cycles

    def _spent(self, step: int) -> str:
        names = ", ".join(self.wanted.source_names)
        return (
            f"step {step + 1}: what data.sources may still give ({names}) is less than the step's "
            f"{self._budget:,} tokens (weights of 0 give nothing); raise max_epochs, add a source, or lower "
            f"train.steps to {step}"
        )


def _odds(buckets: Buckets, kind: Kind) -> Floats | None:
    """float64 [b]: odds of each bucket in a cycle; None for kinds with fixed shares."""
    direction, _, form = kind.partition("-")
    if direction not in ("grow", "shrink"):
        return None
    classes = np.unique(buckets.length)
    rank = np.searchsorted(classes, buckets.length)
    if direction == "grow":
        rank = len(classes) - 1 - rank
    odds: Floats = np.array([_ODDS[form](int(r)) for r in rank])
    odds /= odds.max()
    return odds


def _fixed_shares(buckets: Buckets, wanted: Wanted) -> Floats:
    """float64 [b]: wanted tokens of each bucket inside its source, up to a factor per source."""
    if wanted.kind == "uniform":
        shares = np.ones(len(buckets.length))
    elif wanted.kind == "weights":
        shares = np.array([float(wanted.class_weights.get(int(k), 0.0)) for k in buckets.length])
    else:
        shares = buckets.tokens.astype(np.float64)
    return shares if wanted.bucket_weights is None else shares * wanted.bucket_weights
