"""Which ring rank computes which part of which document (pure).

A part is (document, start, stop) with offsets inside the document. A document is whole on one
rank, or cut into 2 x ring chunks of which rank r holds chunk r and chunk 2 x ring - 1 - r: under a
causal mask each such pair has the same work.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

Part = tuple[int, int, int]

WORK_LIMIT = 1.05
"""Largest accepted max/mean over ranks of causal query-key pairs."""
TOKEN_LIMIT = 1.02
"""Largest accepted max/mean over ranks of tokens."""
_SMALL = 16  # documents up to which many choices of cuts are tried
_MEDIUM = 64  # documents up to which placements are improved by swapping
_HOPELESS = 1.3  # distance from the limits from which swapping does not lead to them
_CHOICES = 64  # choices of equally many cuts up to which all are tried, else (longest, shortest) ones


def contiguous(lengths: Sequence[int], ring: int) -> list[list[Part]]:
    """Equal consecutive shares of the packed sequence, whatever its documents."""
    total = sum(lengths)
    bounds = [total * r // ring for r in range(ring + 1)]
    return [_slice(lengths, [(bounds[r], bounds[r + 1])]) for r in range(ring)]


def zigzag(lengths: Sequence[int], ring: int) -> list[list[Part]]:
    """Head-tail chunk pairs of the packed sequence as a whole, whatever its documents."""
    total, chunks = sum(lengths), 2 * ring
    bounds = [total * c // chunks for c in range(chunks + 1)]
    spans = [(bounds[c], bounds[c + 1]) for c in range(chunks)]
    return [_slice(lengths, [spans[r], spans[chunks - 1 - r]]) for r in range(ring)]


def balanced(lengths: Sequence[int], ring: int) -> list[list[Part]]:
    """Cut as few documents as possible so that work and tokens are even.

    Args:
        lengths: tokens per document.
        ring: number of ranks.

    Returns:
        Per rank its parts. Work max/mean <= 1.05 and tokens max/mean <= 1.02 where some choice of
        cuts reaches both, else the choice that comes closest.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    if ring == 1 or not order:
        return [[(i, 0, lengths[i]) for i in sorted(order)], *([] for _ in range(ring - 1))]
    best: _Shares | None = None
    for cut in _candidates(order, lengths, ring):
        shares = _Shares(lengths, ring, order, cut)
        if best is None or shares.excess < best.excess:
            best = shares
        if shares.excess <= 1.0:
            break
    assert best is not None
    return [sorted(parts) for parts in best.parts]


def causal_work(parts: Iterable[Part]) -> int:
    """Query-key pairs of a causal mask whose queries are these parts."""
    return sum((start + 1 + stop) * (stop - start) // 2 for _, start, stop in parts)


def _candidates(order: list[int], lengths: Sequence[int], ring: int) -> Iterator[set[int]]:
    """Sets of documents to cut, fewest first; later ones only matter if no earlier one fits."""
    count = len(order)
    if count <= _MEDIUM:
        for cuts in range(count + 1):
            if count > _SMALL:
                yield set(order[:cuts])
            elif math.comb(count, cuts) <= _CHOICES:
                yield from (set(chosen) for chosen in combinations(order, cuts))
            else:
                yield from ({*order[: cuts - n], *order[count - n :]} for n in range(cuts + 1))
        return
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if _Shares(lengths, ring, order, set(order[:middle])).excess <= 1.0:
            high = middle
        else:
            low = middle + 1
    for cuts in range(low, count + 1):
        yield set(order[:cuts])


class _Shares:
    """One way to share documents out: the cut ones spread over all ranks, the others placed whole."""

    def __init__(self, lengths: Sequence[int], ring: int, order: list[int], cut: set[int]) -> None:
        self.parts: list[list[Part]] = [[] for _ in range(ring)]
        self._mean_tokens = sum(lengths) / ring
        self._mean_work = sum(n * (n + 1) // 2 for n in lengths) / ring
        # While whole documents are placed, each rank counts an even share of the cut ones.
        tokens = sum(lengths[i] for i in order if i in cut) / ring
        work = sum(lengths[i] * (lengths[i] + 1) // 2 for i in order if i in cut) / ring
        self._tokens, self._work = [tokens] * ring, [work] * ring
        self._place([(i, lengths[i]) for i in order if i not in cut])
        if len(order) <= _MEDIUM:
            self._improve()
        self._tokens, self._work = [t - tokens for t in self._tokens], [w - work for w in self._work]
        for i in order:
            if i in cut:
                self._spread(i, lengths[i])
        self.excess = max(self._excess(rank) for rank in range(ring))

    def _load(self, rank: int) -> float:
        return max(self._work[rank] / self._mean_work, self._tokens[rank] / self._mean_tokens)

    def _excess(self, rank: int, tokens: int = 0, work: int = 0) -> float:
        """How far a rank would be beyond the limits (1.0) with so much more."""
        return max(
            (self._work[rank] + work) / self._mean_work / WORK_LIMIT,
            (self._tokens[rank] + tokens) / self._mean_tokens / TOKEN_LIMIT,
        )

    def _add(self, rank: int, part: Part, sign: int = 1) -> None:
        (self.parts[rank].append if sign > 0 else self.parts[rank].remove)(part)
        self._tokens[rank] += sign * (part[2] - part[1])
        self._work[rank] += sign * (part[1] + 1 + part[2]) * (part[2] - part[1]) // 2

    def _place(self, documents: list[tuple[int, int]]) -> None:
        # Longest first onto the least loaded rank (Graham's LPT rule), load being the worse of both shares.
        heap = [(0.0, rank) for rank in range(len(self.parts))]
        for document, length in documents:
            _, rank = heap[0]
            self._add(rank, (document, 0, length))
            heapq.heapreplace(heap, (self._load(rank), rank))

    def _improve(self) -> None:
        """Swap documents of the worst rank with others' (or with nothing) while that helps."""
        ranks = range(len(self.parts))
        for _ in range(2 * len(ranks)):
            worst = max(ranks, key=lambda r: (self._excess(r), -r))
            now = self._excess(worst)
            if not 1.0 < now < _HOPELESS:
                return
            swaps = [
                (self._swapped(worst, mine, other, theirs), i, other, j)
                for i, mine in enumerate(self.parts[worst])
                for other in ranks
                if other != worst
                for j, theirs in enumerate([None, *self.parts[other]])
            ]
            best, i, other, j = min(swaps, default=(now, 0, 0, 0))
            if best >= now:
                return
            mine, theirs = self.parts[worst][i], [None, *self.parts[other]][j]
            self._add(worst, mine, -1)
            self._add(other, mine)
            if theirs is not None:
                self._add(other, theirs, -1)
                self._add(worst, theirs)

    def _swapped(self, worst: int, mine: Part, other: int, theirs: Part | None) -> float:
        n, m = mine[2], theirs[2] if theirs else 0  # whole documents
        tokens, work = n - m, (n * (n + 1) - m * (m + 1)) // 2
        return max(self._excess(worst, -tokens, -work), self._excess(other, tokens, work))

    def _spread(self, document: int, length: int) -> None:
        ring = len(self.parts)
        sizes = [length // ring] * ring
        for rank in sorted(range(ring), key=lambda r: (self._load(r), r))[: length % ring]:
            sizes[rank] += 1
        mean = sum(self._work) / ring
        # An odd share's extra token goes where it is cheap if the rank has more work than others.
        heads = [(n + 1) // 2 if self._work[r] > mean else n // 2 for r, n in enumerate(sizes)]
        chunks = [(r, heads[r]) for r in range(ring)]
        chunks += [(r, sizes[r] - heads[r]) for r in reversed(range(ring))]
        start = 0
        for rank, size in chunks:
            if size:
                self._add(rank, (document, start, start + size))
            start += size


def _slice(lengths: Sequence[int], spans: list[tuple[int, int]]) -> list[Part]:
    parts, begin = [], 0
    for document, length in enumerate(lengths):
        for low, high in spans:
            start, stop = max(low - begin, 0), min(high - begin, length)
            if start < stop:
                parts.append((document, start, stop))
        begin += length
    return parts
