"""Whole pieces out of real-numbered shares, exactly a step's budget, fair over many steps.

Every function takes columns over buckets [b]. Lengths are powers of two and the budget is a multiple
of the longest, so that descending lengths always fill it exactly.
"""

import numpy as np

from .index import Int64s
from .packing import Floats
from .split import hash_key


def water_fill(weights: Floats, caps: Floats, total: float) -> Floats | None:
    """Divide `total` in proportion to weights, no share above its cap.

    Args:
        weights: float64 [b], not negative.
        caps: float64 [b].
        total: what is divided.

    Returns:
        float64 [b] that adds up to `total`; None if the caps of positive weights are below it.
    """
    open_ = (weights > 0) & (caps > 0)
    if caps[open_].sum() < total * (1 - 1e-9):
        return None
    shares = np.zeros(len(weights))
    while open_.any():
        rest = total - shares[~open_].sum()
        shares[open_] = rest * (weights[open_] / weights[open_].sum())
        above = open_ & (shares >= caps)
        if not above.any():
            return shares
        shares[above] = caps[above]
        open_ &= ~above
    return shares


def draw_mixed(owed: Floats, lengths: Int64s, available: Int64s, budget: int) -> Int64s:
    """Pieces of every bucket by what it is owed.

    Longest first, each bucket gives the whole pieces that it owes; what is left of the budget goes one
    piece at a time to the bucket that is owed most among those that fit. Where only longer ones may be
    drawn, one of them takes the place of shorter ones.

    Args:
        owed: float64 [b], tokens; adds up to the budget.
        lengths: int64 [b].
        available: int64 [b], pieces that may be drawn.
        budget: tokens.

    Returns:
        int64 [b]; less than the budget where not enough is available.
    """
    counts = [0] * len(lengths)
    left, want = lengths.tolist(), owed.tolist()
    may = available.tolist()
    rest = budget
    for b in sorted(range(len(left)), key=lambda b: (-left[b], -want[b], b)):
        count = max(0, min(int(want[b] // left[b]), rest // left[b], may[b]))
        counts[b] = count
        want[b] -= count * left[b]
        may[b] -= count
        rest -= count * left[b]
    while rest > 0:
        fitting = [b for b in range(len(left)) if may[b] > 0 and left[b] <= rest]
        if not fitting:
            _exchange(counts, left, want, may, rest)
            break
        best = max(fitting, key=lambda b: (want[b], left[b], -b))
        count = max(1, min(int(want[best] // left[best]), rest // left[best], may[best]))
        counts[best] += count
        want[best] -= count * left[best]
        may[best] -= count
        rest -= count * left[best]
    return np.array(counts, dtype=np.int64)


def _exchange(counts: list[int], lengths: list[int], want: list[float], may: list[int], rest: int) -> None:
    """Fill a rest that is shorter than every piece that may be drawn: a longer piece for shorter ones.

    Longer pieces and the budget are multiples of the longer piece, so what shorter ones give together with
    the rest is one too: they can give back exactly what is too much.
    """
    longer = [b for b, count in enumerate(may) if count > 0]
    if not longer:
        return
    best = min(longer, key=lambda b: (lengths[b], -want[b], b))
    back = lengths[best] - rest
    counts[best] += 1
    shorter = [b for b, length in enumerate(lengths) if length < lengths[best]]
    for b in sorted(shorter, key=lambda b: (-lengths[b], want[b], b)):
        count = min(counts[b], back // lengths[b])
        counts[b] -= count
        back -= count * lengths[b]


def draw_one_class(
    owed: Floats, lengths: Int64s, available: Int64s, budget: int, *, key: tuple[int, int]
) -> Int64s:
    """Pieces of one class, drawn with odds of what classes are owed, divided over its buckets alike.

    Args:
        owed: float64 [b], tokens; adds up to the budget.
        lengths: int64 [b].
        available: int64 [b], pieces that may be drawn.
        budget: tokens.
        key: (seed, step) of the draw.

    Returns:
        int64 [b]; zeros where no class can fill the budget.
    """
    classes = [int(k) for k in np.unique(lengths) if int(available[lengths == k].sum()) * k >= budget]
    counts = np.zeros(len(lengths), dtype=np.int64)
    if not classes:
        return counts
    wants = np.array([owed[lengths == k].sum() for k in classes])
    odds = np.maximum(wants, 0.0)
    if not odds.any():
        odds = (wants == wants.max()).astype(np.float64)
    point = hash_key(*key) / 2.0**64 * odds.sum()
    chosen = classes[min(int(np.searchsorted(np.cumsum(odds), point, side="right")), len(classes) - 1)]
    members = np.flatnonzero(lengths == chosen)
    counts[members] = _level(owed[members] / chosen, available[members], budget // chosen)
    return counts


def _level(owed: Floats, available: Int64s, count: int) -> Int64s:
    """Divide `count` pieces so that what stays owed is as level as the available pieces allow."""
    if len(owed) == 1:
        return np.array([count], dtype=np.int64)
    counts = np.zeros(len(owed), dtype=np.int64)
    while (rest := count - int(counts.sum())) > 0:
        open_ = np.flatnonzero(counts < available)
        want = (owed - counts)[open_]
        order = np.argsort(-want, kind="stable")
        levels = (np.cumsum(want[order]) - rest) / np.arange(1, len(want) + 1)
        level = levels[np.flatnonzero(want[order] > levels)[-1]]
        more = np.clip(np.floor(want - level), 0, (available - counts)[open_]).astype(np.int64)
        if not more.any():
            more[order[:rest]] = 1
        counts[open_] += more
    return counts
