"""Which key rows each rank fetches from the others at once, and how they lie afterwards (pure)."""

from dataclasses import dataclass

import numpy as np

from .plan import Documents, Messages, Shares, Step, make_step, own_step
from .tiles import Ranges, Span, Tile, by_document, count


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatherPlan:
    """Everything one rank does when it gathers keys."""

    own: Step
    """The rank's queries against its own keys, while the others' arrive."""
    remote: Step
    """The rank's queries against all fetched keys, sorted by document and position."""
    sends: tuple[tuple[int, Ranges], ...]
    """(ring rank, own rows that it needs); ranks that need none are left out."""
    receives: tuple[tuple[int, int], ...]
    """(ring rank, rows fetched from it), ascending."""
    order: np.ndarray
    """[fetched rows]: sorted row i is the row order[i] as received."""

    def messages(self) -> tuple[Messages, Messages]:
        """What is sent of keys in each pass, and of gradients in the backward pass."""
        calls = int(bool(self.sends or self.receives))
        fetched = sum(rows for _, rows in self.receives)
        return Messages(calls, sum(count(rows) for _, rows in self.sends)), Messages(calls, fetched)


def gather_plan(shares: Shares, rank: int) -> GatherPlan:
    """The plan of one rank."""
    ring = len(shares.rows)
    others = [other for other in range(ring) if other != rank]
    needed = {origin: shares.needs(rank, origin) for origin in others}
    wanted = {other: shares.needs(other, rank) for other in others}
    pieces = [_fetched(shares, needed, block) for block in range(len(shares.blocks))]
    order = np.concatenate([np.arange(s.row, s.row + s.length) for s in pieces[0]] or [np.zeros(0, np.int64)])
    tiles = [_tiles(shares, rank, block, _sorted(own)) for block, own in enumerate(pieces)]
    return GatherPlan(
        own=own_step(shares, rank),
        remote=make_step(shares, tiles, len(order)),
        sends=tuple((other, rows) for other, rows in wanted.items() if rows),
        receives=tuple((origin, count(rows)) for origin, rows in needed.items() if rows),
        order=order,
    )


def _fetched(shares: Shares, needed: dict[int, Ranges], block: int) -> list[Span]:
    """Spans of the fetched rows by document and position; `row` counts as received."""
    found, before = [], 0
    for origin, ranges in needed.items():
        spans = [s for own in shares.documents[origin][block].values() for s in own]
        for start, stop in ranges:
            for span in spans:
                low, high = max(start, span.row), min(stop, span.row + span.length)
                if low < high:
                    at = span.start + low - span.row
                    found.append(
                        Span(document=span.document, start=at, length=high - low, row=before + low - start)
                    )
            before += stop - start
    return sorted(found, key=lambda s: (s.document, s.start))


def _sorted(pieces: list[Span]) -> Documents:
    """The same spans after sorting rows, neighbours joined."""
    joined: list[Span] = []
    row = 0
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.document == piece.document and last.start + last.length == piece.start:
            length = last.length + piece.length
            joined[-1] = Span(document=last.document, start=last.start, length=length, row=last.row)
        else:
            joined.append(Span(document=piece.document, start=piece.start, length=piece.length, row=row))
        row += piece.length
    return by_document(joined)


def _tiles(shares: Shares, rank: int, block: int, keys: Documents) -> list[Tile]:
    queries = shares.documents[rank][block]
    tiles = [t for own in shares.by_document(queries, keys, same=False).values() for t in own]
    anchor = shares.anchor
    if anchor is None or anchor.rank == rank:
        return tiles
    first = [s for d, spans in keys.items() if d[0] == anchor.document for s in spans if s.start == 0]
    return tiles + (shares.anchor_tiles(queries, first[0].row) if first else [])
