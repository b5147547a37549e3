"""Tiles (pure): together they are exactly what the mask shows, each pair once, and no row is empty."""

import dense
import pytest
import sequence_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.attention.gather_plan import gather_plan
from parallel.attention.heads import head_blocks, split_heads
from parallel.attention.kernels import unseen
from parallel.attention.mask import Mask
from parallel.attention.plan import Shares, own_step
from parallel.attention.ring_plan import ring_plan
from parallel.attention.tiles import Tile, row_blocks, trimmed
from parallel.errors import ConfigError, UnsupportedError
from parallel.layout import KINDS, SequenceLayout

LENGTHS = st.lists(st.integers(0, 24), min_size=1, max_size=6)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def layout_of(lengths, ring, kind="balanced", rank=0):
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return SequenceLayout.build(offsets, ring=ring, ulysses=1, ring_rank=rank, ulysses_rank=0, kind=kind)


def rows_of(layout, shares, rank):
    """Global token of each row in the order in which the plan counts rows."""
    index = layout.at(rank, 0).token_index
    order = shares.orders[rank]
    return index if order is None else index[torch.from_numpy(order)]


def paint(seen, batches, queries, keys, num_heads):
    for batch in batches:
        heads = slice(None) if batch.heads is None else slice(*batch.heads.q)
        for tile in batch.tiles:
            hidden = unseen(tile, torch.device("cpu"))
            shown = torch.ones(tile.rows, tile.columns) if hidden is None else (~hidden).float()
            assert shown.any(1).all(), f"a row of {tile} sees nothing"
            rows, columns = queries[tile.q : tile.q + tile.rows], keys[tile.k : tile.k + tile.columns]
            if batch.form == "causal":
                assert tile.rows == tile.columns and tile.low == 0
            for head in range(num_heads)[heads]:
                seen[head, rows[:, None], columns] += shown


@pytest.mark.parametrize("ring", [1, 2, 3, 5])
@pytest.mark.parametrize("mask", sequence_cases.MASKS, ids=str)
def test_ring_steps_cover_the_mask_once(ring, mask):
    @settings(SETTINGS, max_examples=12)
    @given(LENGTHS, st.sampled_from(KINDS))
    def run(lengths, kind):
        layout, shown = layout_of(lengths, ring, kind), Mask(**mask)
        blocks = head_blocks(split_heads(4, 2, 1)[0], 4, 2, shown)
        shares = Shares.of(layout, shown, blocks)
        seen = torch.zeros(4, sum(lengths), sum(lengths))
        for rank in range(ring):
            plan = ring_plan(shares, rank, ring, ring)
            queries = rows_of(layout, shares, rank)
            for number, step in enumerate(plan.steps):
                origin = (rank - number) % ring
                keys = rows_of(layout, shares, origin)
                if number:
                    keys = follow(layout, shares, rank, number, ring)
                    assert len(keys) == step.num_keys == sum(t.receive for t in mine(plan, number))
                paint(seen, step.batches, queries, keys, 4)
        offsets = layout.cu_seqlens.tolist()
        assert torch.equal(seen, dense.visible(offsets, shown, 4).float())

    run()


def mine(plan, target):
    return [t for started in plan.transfers for t in started if t.target == target]


def follow(layout, shares, rank, number, ring):
    """Global tokens of the block that reaches `rank` at step `number`, by applying every send."""
    origin = (rank - number) % ring
    keys = rows_of(layout, shares, origin)
    for step in range(number):
        holder = (origin + step) % ring
        sent = [t for t in ring_plan(shares, holder, ring, ring).transfers[step] if t.target == step + 1]
        ranges = sent[0].send if sent else ()
        keys = torch.cat([keys[a:b] for a, b in ranges]) if ranges else keys[:0]
    return keys


@pytest.mark.parametrize("ring", [2, 4])
@pytest.mark.parametrize("mask", sequence_cases.MASKS, ids=str)
def test_gathered_keys_cover_the_mask_once(ring, mask):
    @settings(SETTINGS, max_examples=12)
    @given(LENGTHS, st.sampled_from(KINDS))
    def run(lengths, kind):
        layout, shown = layout_of(lengths, ring, kind), Mask(**mask)
        shares = Shares.of(layout, shown, head_blocks(split_heads(4, 2, 1)[0], 4, 2, shown))
        seen = torch.zeros(4, sum(lengths), sum(lengths))
        for rank in range(ring):
            plan = gather_plan(shares, rank)
            queries = rows_of(layout, shares, rank)
            fetched = [rows_of(layout, shares, rank)[:0]]
            for origin, rows in plan.receives:
                sent = dict(gather_plan(shares, origin).sends)[rank]
                keys = rows_of(layout, shares, origin)
                fetched.append(torch.cat([keys[a:b] for a, b in sent]))
                assert len(fetched[-1]) == rows
            keys = torch.cat(fetched)[torch.from_numpy(plan.order)]
            paint(seen, plan.own.batches, queries, rows_of(layout, shares, rank), 4)
            paint(seen, plan.remote.batches, queries, keys, 4)
        assert torch.equal(seen, dense.visible(layout.cu_seqlens.tolist(), shown, 4).float())

    run()


def test_a_head_tail_pair_is_one_tile_per_hop():
    layout = layout_of([64], 4, "balanced")
    shares = Shares.of(layout, Mask(), None)
    for rank in range(4):
        plan = ring_plan(shares, rank, 4, 4)
        tiles = [[t for batch in step.batches for t in batch.tiles] for step in plan.steps]
        assert [len(t) for t in tiles] == [1, 1, 1, 1]
        assert next((t.rows, t.columns) for (t,) in tiles) == (16, 16)
        assert sorted((t.rows, t.columns) for (t,) in tiles[1:]) == sorted(
            [(16, 8)] * rank + [(8, 16)] * (3 - rank)
        )


def test_a_document_on_one_rank_is_one_causal_square():
    layout = layout_of([7, 5], 1)
    (batch,) = own_step(Shares.of(layout, Mask(), None), 0).batches
    assert batch.form == "causal"
    assert batch.tiles == (Tile(0, 7, 0, 7, 0), Tile(7, 5, 7, 5, 0))
    assert batch.q_span == batch.k_span == (0, 12)


@SETTINGS
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.none() | st.integers(-12, 12),
    st.none() | st.integers(-12, 12),
    st.integers(1, 4),
)
def test_trimming_and_blocks_keep_every_pair(rows, columns, low, high, size):
    def shown(tiles):
        seen = torch.zeros(rows, columns)
        for tile in tiles:
            hidden = unseen(tile, torch.device("cpu"))
            part = torch.ones(tile.rows, tile.columns) if hidden is None else (~hidden).float()
            seen[tile.q : tile.q + tile.rows, tile.k : tile.k + tile.columns] += part
        return seen

    whole = Tile(0, rows, 0, columns, low, high)
    tile = trimmed(whole)
    expected = shown([whole])
    assert (tile is None) == (not expected.any())
    if tile is not None:
        assert torch.equal(shown([tile]), expected)
        assert torch.equal(shown(row_blocks(tile, size)), expected)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"window": 0}, ConfigError, "window=0"),
        ({"sinks": -1, "window": 4}, ConfigError, "sinks=-1"),
        ({"min_distance": -2}, ConfigError, "min_distance=-2"),
        ({"group_shift": 1}, ConfigError, "group_shift=1"),
        ({"window": 3.5}, ConfigError, r"window=3\.5 is no whole number"),
        ({"block_stride": 4}, ConfigError, r"block_stride=4"),
        ({"block_stride": (0, 2)}, ConfigError, r"block_stride=\(0, 2\)"),
        ({"sinks": 4}, UnsupportedError, "sinks adds to a window"),
        ({"min_distance": 2, "causal": False}, UnsupportedError, "causal=True"),
        ({"min_distance": 2, "anchor": True}, UnsupportedError, "anchor"),
        ({"group_shift": 4, "window": 4}, UnsupportedError, "group_shift does not combine with window"),
        ({"block_stride": (4, 2), "anchor": True}, UnsupportedError, "block_stride does not combine"),
    ],
)
def test_masks_that_mean_nothing_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        Mask(**fields)
