"""Whole documents into fixed token budgets, without padding.

Documents longer than `seq_len` are cut into consecutive pieces. In every epoch the pieces are drawn
in a seeded order and packed window by window: best fit, longest first, into packs of at most
`microbatch_tokens`. The packs of all epochs form one stream; step s owns the packs
[s * packs_per_step, (s + 1) * packs_per_step). So *which documents form a step is a pure function of
(seed, step)*; who computes them is decided by `assign` alone.

Source: best-fit-decreasing packing, as in Ding et al., "Fewer truncations improve language modeling",
ICML 2024, section 3; here over windows, so that order stays random and the first step needs no epoch.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from .index import Int64s
from .split import hash_key, hash_numbers

Floats = npt.NDArray[np.float64]
Tail = Literal["keep", "drop"]
WINDOW = 4096
"""Pieces that are packed together."""
_CARRY_FILL = 0.98
_CARRY = WINDOW // 4
"""Up to so many pieces of packs filled less than `_CARRY_FILL` go back into the next window."""


class Piece(NamedTuple):
    """Consecutive tokens of one document, one attention sequence."""

    doc: int
    """Number of the document in the store."""
    start: int
    """First token, counted in the document."""
    length: int
    """Tokens."""
    cost: int | None = None
    """Tokens of text that it costs as much as; None: `length`. For pieces with more than text."""

    @property
    def weight(self) -> int:
        """Tokens that planning and balancing count."""
        return self.length if self.cost is None else self.cost


Pack = tuple[Piece, ...]
"""Pieces that share a microbatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """All pieces of a corpus, as columns; an index over the store, not a copy of tokens."""

    doc: Int64s
    """int64 [P]: document of each piece."""
    start: Int64s
    """int64 [P]: first token in the document."""
    length: Int64s
    """int64 [P]: tokens."""
    cost: Int64s | None = None
    """int64 [P]: see `Piece.cost`; None: every piece costs its length."""

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.doc)

    def pack(self, members: Int64s) -> Pack:
        """The pieces with these numbers."""
        columns = [self.doc[members], self.start[members], self.length[members]]
        if self.cost is not None:
            columns.append(self.cost[members])
        return tuple(Piece(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def cut(num_tokens: int, seq_len: int, *, tail: Tail = "keep", min_len: int = 2) -> list[tuple[int, int]]:
    """Cut one document into consecutive pieces.

    Args:
        num_tokens: length of the document.
        seq_len: longest piece in tokens.
        tail: what happens to the rest of a document longer than `seq_len`; shorter documents stay whole.
        min_len: shorter pieces are left out. A piece of one token predicts nothing.

    Returns:
        (start, length) of each piece, ascending.
    """
    full, rest = divmod(num_tokens, seq_len)
    pieces = [(i * seq_len, seq_len) for i in range(full)]
    if rest >= max(1, min_len) and (tail == "keep" or full == 0):
        pieces.append((full * seq_len, rest))
    return pieces


def cut_documents(
    documents: Int64s, lengths: Int64s, *, seq_len: int, tail: Tail = "keep", min_len: int = 2
) -> Pieces:
    """`cut` for many documents at once.

    Args:
        documents: int64 [n], their numbers in the store.
        lengths: int64 [n], their tokens.
        seq_len: see `cut`.
        tail: see `cut`.
        min_len: see `cut`.

    Raises:
        ConfigError: no piece can be as short as seq_len and as long as min_len.
    """
    if not 1 <= max(1, min_len) <= seq_len:
        raise ConfigError(
            f"data.min_len={min_len} is above data.seq_len={seq_len}: nothing would be left; lower "
            f"data.min_len or raise data.seq_len (at least 1)"
        )
    full, rest = np.divmod(lengths, seq_len)
    kept = (rest >= max(1, min_len)) & ((full == 0) | (tail == "keep"))
    count = full + kept
    owner = np.repeat(np.arange(len(lengths)), count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    length = np.where(within < full[owner], seq_len, rest[owner])
    return Pieces(doc=documents[owner], start=within * seq_len, length=length)


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items, longest first, each into the fullest bin that still holds it.

    Args:
        lengths: of the items, none above `budget`.
        budget: size of a bin.

    Returns:
        For each bin the numbers of its items.
    """
    bins: list[list[int]] = []
    space: list[int] = []  # room * 2^32 + bin, ascending: one integer is cheaper to bisect than a pair
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        place = bisect_left(space, length << 32)
        if place == len(space):
            room, number = budget, len(bins)
            bins.append([])
        else:
            room, number = divmod(space.pop(place), 1 << 32)
        bins[number].append(item)
        if room > length:
            insort(space, (room - length) << 32 | number)
    return bins


class EpochPacks:
    """Packs of one epoch, made window by window as they are asked for."""

    def __init__(self, pieces: Pieces, *, key: int, budget: int) -> None:
        self._pieces, self._key, self._budget = pieces, key, budget
        self._order = np.argsort(hash_numbers(np.arange(len(pieces)), key), kind="stable")
        self._drawn = 0
        self._carried = np.zeros(0, dtype=np.int64)
        self._ends: list[int] = []  # packs up to and with each window
        self._windows: list[list[Int64s]] = []

    @property
    def count(self) -> int:
        """Packs made so far."""
        return self._ends[-1] if self._ends else 0

    def has(self, number: int) -> bool:
        """Whether the epoch has a pack of this number; packs windows until that is known."""
        while number >= self.count and self._drawn < len(self._order):
            self._next_window()
        return number < self.count

    def __getitem__(self, number: int) -> Pack:
        """A pack that `has` found."""
        window = bisect_right(self._ends, number)
        first = self._ends[window - 1] if window else 0
        return self._pieces.pack(self._windows[window][number - first])

    def _next_window(self) -> None:
        fresh = self._order[self._drawn : self._drawn + WINDOW]
        self._drawn += len(fresh)
        items = np.concatenate([self._carried, fresh])
        lengths = self._pieces.length[items]
        bins = [np.array(members) for members in best_fit(lengths.tolist(), self._budget)]
        fill = np.array([int(lengths[members].sum()) for members in bins]) / self._budget
        keep = np.ones(len(bins), dtype=bool)
        if self._drawn < len(self._order):
            keep = _keep(fill, np.array([len(members) for members in bins]))
        self._carried = np.concatenate(
            [np.zeros(0, np.int64), *(items[members] for members, k in zip(bins, keep, strict=True) if not k)]
        )
        kept = np.flatnonzero(keep)
        shuffled = kept[
            np.argsort(hash_numbers(kept, hash_key(self._key, len(self._windows))), kind="stable")
        ]
        self._windows.append([items[bins[i]] for i in shuffled])
        self._ends.append(self.count + len(kept))


def _keep(fill: Floats, pieces: Int64s) -> npt.NDArray[np.bool_]:
    """Which packs are final; the emptiest others, up to `_CARRY` pieces, are packed again."""
    order = np.argsort(fill, kind="stable")
    again = (np.cumsum(pieces[order]) <= _CARRY) & (fill[order] < _CARRY_FILL)
    keep = np.ones(len(fill), dtype=bool)
    keep[order[again]] = False
    return keep


class StepPacks:
    """The packs of every step, for any step in any order."""

    def __init__(self, pieces: Pieces, *, seed: int, microbatch_tokens: int, packs_per_step: int) -> None:
        if not len(pieces):
            raise DataError(
                "no document to train on has at least data.min_len tokens; add documents, or lower "
                "data.min_len or data.held_out"
            )
        longest = int(pieces.length.max())
        if longest > microbatch_tokens:
            raise ConfigError(
                f"a piece of {longest:,} tokens does not fit into train.microbatch_tokens="
                f"{microbatch_tokens:,}; raise train.microbatch_tokens, or lower data.seq_len to it"
            )
        if packs_per_step < 1:
            raise ConfigError(
                f"train.global_batch_tokens is below train.microbatch_tokens={microbatch_tokens:,}; raise it "
                f"to a multiple of that"
            )
        self.pieces = pieces
        self.microbatch_tokens = microbatch_tokens
        self.packs_per_step = packs_per_step
        self._seed = seed
        self._ends: list[int] = []  # packs up to and with each epoch whose size is known
        self._epochs: dict[int, EpochPacks] = {}

    def packs(self, step: int) -> list[Pack]:
        """The packs of a step, `packs_per_step` of them."""
        first = step * self.packs_per_step
        return [self._pack(number) for number in range(first, first + self.packs_per_step)]

    def exhausted(self, step: int) -> list[str]:
        """No source ever is: epochs go on."""
        return []

    def epoch_packs(self, epoch: int) -> int:
        """Number of packs in an epoch; packs all of it."""
        made = self._epoch(epoch)
        while made.has(made.count):
            pass
        return made.count

    def fill(self, epoch: int = 0) -> float:
        """Share of the token budget that an epoch's packs use."""
        tokens = int(self.pieces.length.sum())
        return tokens / (self.epoch_packs(epoch) * self.microbatch_tokens)

    def _pack(self, number: int) -> Pack:
        epoch = bisect_right(self._ends, number)
        while True:
            within = number - (self._ends[epoch - 1] if epoch else 0)
            if self._epoch(epoch).has(within):
                return self._epoch(epoch)[within]
            self._ends.append(number - within + self._epoch(epoch).count)
            epoch += 1

    def _epoch(self, epoch: int) -> EpochPacks:
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[:-1]:  # a step may straddle two epochs
                del self._epochs[old]
            key = hash_key(self._seed, epoch)
            self._epochs[epoch] = EpochPacks(self.pieces, key=key, budget=self.microbatch_tokens)
        return self._epochs[epoch]


def work(pack: Pack) -> int:
    """Causal attention work of a pack, up to a constant: sum of squared lengths."""
    return sum(piece.weight**2 for piece in pack)


def assign(packs: Sequence[Pack], *, group: int, num_groups: int) -> list[Pack]:
    """The packs that one data group computes: the same number for all, work balanced.

    Packs sorted by work are dealt out in a snake, so the groups' n-th microbatches are alike too.

    Args:
        packs: of a step.
        group: number of the data group.
        num_groups: data groups.

    Returns:
        ceil(len(packs) / num_groups) packs; the last may be empty.
    """
    order = sorted(range(len(packs)), key=lambda i: (-work(packs[i]), i))
    rows = -(-len(packs) // num_groups)
    columns = (group if row % 2 == 0 else num_groups - 1 - group for row in range(rows))
    places = [row * num_groups + column for row, column in enumerate(columns)]
    return [packs[order[place]] if place < len(packs) else () for place in places]
