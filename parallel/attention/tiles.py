"""From shares of documents and a mask to rectangles of queries and keys (pure).

A tile is a rectangle of query rows and key rows of which a band is seen: row i and column j, both
counted inside the tile, see each other if low <= i - j <= high. Three forms reach a kernel: full,
causal on a square (so that top-left and bottom-right alignment agree), and band. Every row of a
tile sees at least one key.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .mask import Mask

Ranges = tuple[tuple[int, int], ...]
"""Ascending, disjoint (start, stop) row ranges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive rows of a rank that are consecutive positions of one (virtual) document."""

    document: tuple[int, ...]
    """What tells the document from others."""
    start: int
    """Position of the first row in the document."""
    length: int
    """Number of rows."""
    row: int
    """Index of the first row on its rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Consecutive query heads with the consecutive key heads that they share evenly."""

    q: tuple[int, int]
    """Query heads [start, stop) on this rank."""
    kv: tuple[int, int]
    """Key and value heads [start, stop) on this rank."""
    shifted: bool = False
    """Whether these heads see the shifted groups of `Mask.group_shift`."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of query rows and key rows."""

    q: int
    """First query row."""
    rows: int
    """Number of query rows."""
    k: int
    """First key row."""
    columns: int
    """Number of key rows."""
    low: int | None = None
    """Least i - j that is seen; None for no bound."""
    high: int | None = None
    """Largest i - j that is seen; None for no bound."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileBatch:
    """Tiles with the same band for the same heads: one kernel call where the kernel can."""

    tiles: tuple[Tile, ...]
    """The rectangles; query rows may repeat over tiles."""
    heads: Heads | None
    """The heads they are for; None for all."""
    low: int | None
    """Their common `Tile.low`."""
    high: int | None
    """Their common `Tile.high`."""
    q_span: tuple[int, int] | None
    """Rows [start, stop) that the tiles' queries are in order, if they are consecutive."""
    k_span: tuple[int, int] | None
    """Rows [start, stop) that the tiles' keys are in order, if they are consecutive."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Room for what a kernel derives from the tiles (offsets on its device, blocks)."""

    @property
    def form(self) -> str:
        """One of "full", "causal" (square tiles) and "band"."""
        if self.low is None and self.high is None:
            return "full"
        square = all(tile.rows == tile.columns for tile in self.tiles)
        return "causal" if square and self.low == 0 and self.high is None else "band"


def batches(tiles: Iterable[Tile], heads: Heads | None) -> tuple[TileBatch, ...]:
    """Group tiles by band, in order of first appearance."""
    groups: dict[tuple[int | None, int | None], list[Tile]] = {}
    for tile in tiles:
        groups.setdefault((tile.low, tile.high), []).append(tile)
    return tuple(
        TileBatch(
            tiles=tuple(group),
            heads=heads,
            low=low,
            high=high,
            q_span=_consecutive([(t.q, t.q + t.rows) for t in group]),
            k_span=_consecutive([(t.k, t.k + t.columns) for t in group]),
        )
        for (low, high), group in groups.items()
    )


def by_document(spans: Iterable[Span]) -> dict[tuple[int, ...], list[Span]]:
    """Spans of each document, ascending."""
    found: dict[tuple[int, ...], list[Span]] = {}
    for span in spans:
        found.setdefault(span.document, []).append(span)
    return found


def tiles_between(queries: Sequence[Span], keys: Sequence[Span], mask: Mask, *, same: bool) -> list[Tile]:
    """Tiles of one document's queries on one rank against its keys on one rank.

    Args:
        queries: the document's spans on the querying rank, ascending, in consecutive rows.
        keys: its spans on the key rank, ascending, in consecutive rows; disjoint from the
            queries' unless `same`.
        mask: what is seen inside a document.
        same: whether both are the same spans of one rank.
    """
    if not mask.dense:
        return [tile for q in queries for k in keys for tile in _bands(q, k, mask)]
    first, rows = queries[0].row, sum(span.length for span in queries)
    if same:
        return [Tile(first, rows, first, rows, 0 if mask.causal else None)]
    if not mask.causal:
        return [Tile(first, rows, keys[0].row, sum(span.length for span in keys))]
    return _staircase(queries, keys)


def _staircase(queries: Sequence[Span], keys: Sequence[Span]) -> list[Tile]:
    # Disjoint spans are before or behind each other, so each query span sees a prefix of the keys'
    # rows; neighbours with the same prefix join, which leaves one tile per head-tail pair and hop.
    steps: list[list[int]] = []
    for query in queries:
        seen = sum(key.length for key in keys if key.start < query.start)
        if steps and steps[-1][2] == seen:
            steps[-1][1] += query.length
        else:
            steps.append([query.row, query.length, seen])
    return [Tile(row, rows, keys[0].row, seen) for row, rows, seen in steps if seen]


def _bands(query: Span, key: Span, mask: Mask) -> list[Tile]:
    low = mask.min_distance if mask.causal else None
    if mask.window is None:
        return _band(query, key, low, None)
    near = _band(query, key, low if mask.causal else 1 - mask.window, mask.window - 1)
    sink = min(key.length, mask.sinks - key.start)
    if sink <= 0:
        return near
    # What the window leaves out of the sinks: at least `window` behind, and if not causal also before.
    head = Span(document=key.document, start=key.start, length=sink, row=key.row)
    far = _band(query, head, max(mask.window, mask.min_distance), None)
    return near + far + ([] if mask.causal else _band(query, head, None, -mask.window))


def _band(query: Span, key: Span, low: int | None, high: int | None) -> list[Tile]:
    """Tiles of low <= p - s <= high, p and s being positions in the document."""
    shift = query.start - key.start
    whole = Tile(
        query.row,
        query.length,
        key.row,
        key.length,
        None if low is None else low - shift,
        None if high is None else high - shift,
    )
    tile = trimmed(whole)
    if tile is None:
        return []
    return _squared(tile) if tile.low is not None and tile.high is None else [tile]


def trimmed(tile: Tile) -> Tile | None:
    """The tile without rows and columns that see nothing, and without bounds that bind nothing."""
    low, high = tile.low, tile.high
    top = 0 if low is None else max(0, low)
    bottom = tile.rows if high is None else min(tile.rows, tile.columns + high)
    left = 0 if high is None else max(0, top - high)
    right = tile.columns if low is None else min(tile.columns, bottom - low)
    rows, columns = bottom - top, right - left
    if rows <= 0 or columns <= 0 or (low is not None and high is not None and low > high):
        return None
    low = None if low is None or low - top + left <= 1 - columns else low - top + left
    high = None if high is None or high - top + left >= rows - 1 else high - top + left
    return Tile(tile.q + top, rows, tile.k + left, columns, low, high)


def _squared(tile: Tile) -> list[Tile]:
    """A trimmed tile bounded only from below, as full rectangles and one causal square."""
    assert tile.low is not None
    seen = -tile.low  # columns in front of the square, seen by every row
    side = tile.columns - seen
    square = Tile(tile.q, side, tile.k + seen, side, 0)
    before = Tile(tile.q, tile.rows, tile.k, seen)
    below = Tile(tile.q + side, tile.rows - side, tile.k + seen, side)
    return [piece for piece in (square, before, below) if piece.rows and piece.columns]


def row_blocks(tile: Tile, size: int) -> list[Tile]:
    """The tile cut into blocks of at most `size` rows, each trimmed to the columns it sees."""
    blocks = []
    for first in range(0, tile.rows, size):
        low = None if tile.low is None else tile.low - first
        high = None if tile.high is None else tile.high - first
        rows = min(size, tile.rows - first)
        block = trimmed(Tile(tile.q + first, rows, tile.k, tile.columns, low, high))
        assert block is not None and block.rows == rows, f"a row of {tile} sees nothing"
        blocks.append(block)
    return blocks


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Merge row ranges into ascending disjoint ones."""
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        elif start < stop:
            merged.append([start, stop])
    return tuple((start, stop) for start, stop in merged)


def count(ranges: Ranges) -> int:
    """Number of rows."""
    return sum(stop - start for start, stop in ranges)


def within(ranges: Ranges, outer: Ranges) -> Ranges:
    """Where `ranges` are in a block that holds exactly the rows `outer`, packed in order."""
    return union((packed(start, outer), packed(start, outer) + stop - start) for start, stop in ranges)


def packed(row: int, outer: Ranges) -> int:
    """Index of `row` in a block that holds exactly the rows `outer`, packed in order."""
    before = 0
    for start, stop in outer:
        if start <= row < stop:
            return before + row - start
        before += stop - start
    raise AssertionError(f"row {row} is not among {outer}")


def _consecutive(ranges: list[tuple[int, int]]) -> tuple[int, int] | None:
    ends = all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    return (ranges[0][0], ranges[-1][1]) if ends else None
