"""Who computes which tiles with which keys, and which key rows travel (pure).

Rows are counted on the ring rank that owns them (on a ulysses rank after the exchange of heads).
Plans depend on the layout, the mask and the division of heads only; they are kept on the layout,
so every layer after the first finds them ready.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..layout import Segment, SequenceLayout
from .mask import Mask
from .tiles import (
    Heads,
    Ranges,
    Span,
    Tile,
    TileBatch,
    batches,
    by_document,
    count,
    packed,
    tiles_between,
    union,
)

Documents = dict[tuple[int, ...], list[Span]]

KEYS, GRADIENTS = "kv", "dkv"
"""Labels in `comm.Counter` of messages with keys and values, and with their gradients."""


@dataclass(frozen=True, slots=True)
class Messages:
    """What one rank sends along the ring axis in one pass."""

    calls: int
    """Number of exchanges that it takes part in."""
    rows: int
    """Key rows sent; each is 2 K D elements."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One computation: this rank's queries against one block of keys."""

    batches: tuple[TileBatch, ...]
    """Tiles; query rows of this rank, key rows of the block."""
    num_keys: int
    """Rows of the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """Where the packed sequence's first token is."""

    rank: int
    """Ring rank that holds it."""
    row: int
    """Its row there."""
    document: int
    """Its document; empty documents may come before."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shares:
    """What every ring rank holds, as spans of virtual documents that see only themselves."""

    mask: Mask
    """What is seen."""
    blocks: tuple[Heads | None, ...]
    """Blocks of heads that are computed apart."""
    documents: tuple[tuple[Documents, ...], ...]
    """[ring rank][block of heads]: spans by virtual document."""
    past: tuple[tuple[Documents, ...], ...]
    """The same of earlier slices, whose keys come before the rank's own; empty without slices."""
    past_rows: tuple[int, ...]
    """Key rows of earlier slices on each ring rank."""
    rows: tuple[int, ...]
    """Key rows of each ring rank, those of earlier slices first."""
    orders: tuple[np.ndarray | None, ...]
    """Per ring rank the order of rows in which spans are counted; None for the layout's own."""
    anchor: Anchor | None
    """The first token, if the mask shows it to every document."""

    @staticmethod
    def of(layout: SequenceLayout, mask: Mask, heads: tuple[Heads, ...] | None) -> "Shares":
        """The shares of a layout, computed once per (mask, heads)."""
        key = ("shares", mask, heads)
        if key not in layout.plans:
            layout.plans[key] = _shares(layout, mask, heads or (None,))
        found: Shares = layout.plans[key]
        return found

    def tiles(self, rank: int, origin: int) -> list[list[Tile]]:
        """Per block of heads: tiles of `rank`'s queries against all keys of `origin`."""
        pairs = zip(self.documents[rank], self.documents[origin], self.past[origin], strict=True)
        same, before = rank == origin, self.past_rows[origin]
        found = []
        for own, keys, past in pairs:
            tiles = [t for found in self.by_document(own, past, same=False).values() for t in found]
            for those in self.by_document(own, keys, same=same).values():
                tiles += [replace(t, k=t.k + before) for t in those] if before else those
            if self.anchor and self.anchor.rank == origin:
                tiles += self.anchor_tiles(own, self.anchor.row)
            found.append(tiles)
        return found

    def keys(self, origin: int) -> list[Documents]:
        """Per block of heads the spans of all keys of a rank, by document."""
        before = self.past_rows[origin]
        found = []
        for past, own in zip(self.past[origin], self.documents[origin], strict=True):
            spans = [s for those in past.values() for s in those]
            spans += [replace(s, row=s.row + before) for those in own.values() for s in those]
            found.append(by_document(spans))
        return found

    def by_document(
        self, queries: Documents, keys: Documents, *, same: bool
    ) -> dict[tuple[int, ...], list[Tile]]:
        """Tiles of each document that both sides hold; documents without tiles are left out."""
        found = {}
        for document in sorted(queries.keys() & keys.keys()):
            mask = self.mask
            if self.anchor is not None and document[0] == self.anchor.document and mask.window is not None:
                # Inside its own document the anchor is an ordinary key that no window hides.
                mask = replace(mask, sinks=max(mask.sinks, 1))
            tiles = tiles_between(queries[document], keys[document], mask, same=same)
            if tiles:
                found[document] = tiles
        return found

    def anchor_tiles(self, queries: Documents, row: int) -> list[Tile]:
        """Tiles of every later document's queries against the first token, which is key `row`."""
        assert self.anchor is not None
        own = [span for d, spans in queries.items() if d[0] != self.anchor.document for span in spans]
        rows = union((span.row, span.row + span.length) for span in own)
        return [Tile(start, stop - start, row, 1) for start, stop in rows]

    def needs(self, rank: int, origin: int) -> Ranges:
        """Key rows of `origin` that `rank`'s queries see.

        Under a dense mask a document's rows on one rank stay together: the busiest rank sends all
        of them anyway, and every hop is then one slice per document.
        """
        needed: list[tuple[int, int]] = []
        for queries, keys in zip(self.documents[rank], self.keys(origin), strict=True):
            for document, tiles in self.by_document(queries, keys, same=False).items():
                if self.mask.dense:
                    needed.append((keys[document][0].row, keys[document][-1].row + keys[document][-1].length))
                else:
                    needed += [(tile.k, tile.k + tile.columns) for tile in tiles]
            if self.anchor and self.anchor.rank == origin and self.anchor_tiles(queries, 0):
                needed.append((self.anchor.row, self.anchor.row + 1))
        return union(needed)


def own_step(shares: Shares, rank: int) -> Step:
    """The rank's queries against its own keys, which travel nowhere."""
    return make_step(shares, shares.tiles(rank, rank), shares.rows[rank])


def block_step(shares: Shares, rank: int, origin: int, held: Ranges) -> Step:
    """The rank's queries against a block that holds the rows `held` of `origin`, packed."""
    tiles = [[replace(t, k=packed(t.k, held)) for t in own] for own in shares.tiles(rank, origin)]
    return make_step(shares, tiles, count(held))


def make_step(shares: Shares, tiles: Sequence[list[Tile]], num_keys: int) -> Step:
    """Group tiles, given per block of heads, into batches."""
    pairs = zip(tiles, shares.blocks, strict=True)
    return Step(batches=tuple(b for own, heads in pairs for b in batches(own, heads)), num_keys=num_keys)


def _shares(layout: SequenceLayout, mask: Mask, blocks: tuple[Heads | None, ...]) -> Shares:
    documents, orders = [], []
    for segments in layout.segments:
        spans = _spans(segments)
        order = None
        if mask.block_stride is not None:
            spans, order = _strided(spans, *mask.block_stride)
        documents.append(tuple(by_document(_grouped(spans, mask.group_shift, heads)) for heads in blocks))
        orders.append(order)
    past = layout.past or ((),) * layout.ring
    past_rows = tuple(layout.past_rows(rank) for rank in range(layout.ring))
    return Shares(
        mask=mask,
        blocks=blocks,
        documents=tuple(documents),
        past=tuple(tuple(by_document(_spans(own)) for _ in blocks) for own in past),
        past_rows=past_rows,
        rows=tuple(before + layout.ring_tokens(rank) for rank, before in enumerate(past_rows)),
        orders=tuple(orders),
        anchor=_anchor(layout) if mask.anchor else None,
    )


def _spans(segments: Sequence[Segment]) -> list[Span]:
    return [Span(document=(s.document,), start=s.start, length=s.length, row=s.row) for s in segments]


def _anchor(layout: SequenceLayout) -> Anchor | None:
    for rank, segments in enumerate(layout.segments):
        for segment in segments:
            if segment.start + int(layout.cu_seqlens[segment.document]) == 0:
                return Anchor(rank=rank, row=segment.row, document=segment.document)
    return None


def _grouped(spans: list[Span], group: int | None, heads: Heads | None) -> list[Span]:
    """Cut spans where groups of `Mask.group_shift` begin."""
    if group is None:
        return spans
    shift = group // 2 if heads is not None and heads.shifted else 0
    cut = []
    for span in spans:
        start, stop = span.start, span.start + span.length
        while start < stop:
            index = (start + shift) // group
            end = min(stop, (index + 1) * group - shift)
            row = span.row + start - span.start
            cut.append(Span(document=(*span.document, index), start=start, length=end - start, row=row))
            start = end
    return cut


def _strided(spans: list[Span], block: int, stride: int) -> tuple[list[Span], np.ndarray]:
    """Reorder rows so that blocks which see each other are neighbours, and count along them."""
    if not spans:
        return [], np.zeros(0, dtype=np.int64)
    document = np.concatenate([np.full(s.length, s.document[0]) for s in spans])
    position = np.concatenate([np.arange(s.start, s.start + s.length) for s in spans])
    residue = position // block % stride
    along = position // block // stride * block + position % block
    order = np.lexsort((along, residue, document))
    document, residue, along = document[order], residue[order], along[order]
    breaks = (np.diff(document) != 0) | (np.diff(residue) != 0) | (np.diff(along) != 1)
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(order)]
    reordered = [
        Span(document=(int(document[a]), int(residue[a])), start=int(along[a]), length=b - a, row=a)
        for a, b in itertools.pairwise(starts)
    ]
    return reordered, order
