"""Which ring rank computes which part of which document (pure).

A part is (document, start, stop) with offsets inside the document. A document is whole on one
rank, or cut into 2 x ring chunks of which rank r holds chunk r and chunk 2 x ring - 1 - r: under a
causal mask each such pair has the same work.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence

Part = tuple[int, int, int]

WORK_LIMIT = 1.05
"""Largest accepted max/mean over ranks of causal query-key pairs."""
TOKEN_LIMIT = 1.02
"""Largest accepted max/mean over ranks of tokens."""
_EXHAUSTIVE = 24  # documents up to which every (longest, shortest) choice of cuts is tried


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
    if count <= _EXHAUSTIVE:
        for cuts in range(count + 1):
            for shortest in range(cuts + 1):
                yield {*order[: cuts - shortest], *order[count - shortest :]}
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
        self._tokens = [0] * ring
        self._work = [0] * ring
        self._mean_tokens = sum(lengths) / ring
        self._mean_work = sum(n * (n + 1) // 2 for n in lengths) / ring
        self._place([(i, lengths[i]) for i in order if i not in cut])
        for i in order:
            if i in cut:
                self._spread(i, lengths[i])
        work, tokens = max(self._work) / self._mean_work, max(self._tokens) / self._mean_tokens
        self.excess = max(work / WORK_LIMIT, tokens / TOKEN_LIMIT)

    def _load(self, rank: int) -> float:
        return max(self._work[rank] / self._mean_work, self._tokens[rank] / self._mean_tokens)

    def _add(self, rank: int, part: Part) -> None:
        self.parts[rank].append(part)
        self._tokens[rank] += part[2] - part[1]
        self._work[rank] += causal_work([part])

    def _place(self, documents: list[tuple[int, int]]) -> None:
        # Longest first onto the least loaded rank (Graham's LPT rule), load being the worse of both shares.
        heap = [(0.0, rank) for rank in range(len(self.parts))]
        for document, length in documents:
            _, rank = heap[0]
            self._add(rank, (document, 0, length))
            heapq.heapreplace(heap, (self._load(rank), rank))

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
