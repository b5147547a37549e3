"""Layouts (pure): every token once, few cuts, even work and tokens, and named refusals."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.balance import TOKEN_LIMIT, WORK_LIMIT
from parallel.errors import ConfigError
from parallel.layout import KINDS, SequenceLayout

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def build(lengths, ring, ulysses=1, kind="balanced"):
    offsets = [0, *np.cumsum(lengths).tolist()]
    return SequenceLayout.build(offsets, ring=ring, ulysses=ulysses, ring_rank=0, ulysses_rank=0, kind=kind)


def balance(layout):
    """Work and tokens per ring rank as max / mean, and the number of documents on several ranks."""
    work = [sum((s.start + 1 + s.stop) * s.length / 2 for s in own) for own in layout.segments]
    tokens = [sum(s.length for s in own) for own in layout.segments]
    where = [{s.document for s in own} for own in layout.segments]
    cuts = sum(sum(d in own for own in where) > 1 for d in set().union(*where))
    return max(work) / np.mean(work), max(tokens) / np.mean(tokens), cuts


def tokens_of(layout):
    return [layout.at(r, u).token_index.tolist() for r in range(layout.ring) for u in range(layout.ulysses)]


@SETTINGS
@given(
    st.lists(st.integers(0, 60), max_size=40),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(KINDS),
)
def test_every_token_has_one_rank(lengths, ring, ulysses, kind):
    layout = build(lengths, ring, ulysses, kind)
    shares = tokens_of(layout)
    assert sorted(token for share in shares for token in share) == list(range(sum(lengths)))
    assert all(share == sorted(share) for share in shares)
    for r in range(ring):
        sizes = [len(share) for share in shares[r * ulysses : (r + 1) * ulysses]]
        assert sizes == layout.shares(r) and sum(sizes) == layout.ring_tokens(r)
        assert max(sizes) - min(sizes) <= 1


def test_kinds_on_one_document():
    def shares(kind):
        return tokens_of(build([16], 2, 1, kind))

    assert shares("contiguous") == [list(range(8)), list(range(8, 16))]
    assert shares("zigzag") == [[0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12))]
    assert shares("balanced") == shares("zigzag")


def test_ulysses_ranks_hold_consecutive_shares_of_a_ring_rank():
    assert tokens_of(build([11], 1, 3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_short_documents_stay_whole():
    layout = build([10] * 8, 4)
    assert balance(layout) == (1.0, 1.0, 0)
    assert all(s.start == 0 and s.length == 10 for own in layout.segments for s in own)


@pytest.mark.parametrize(
    ("lengths", "ring", "peer"),
    [([4, 12], 2, 1.41), ([64, 64, 128, 768], 8, 1.51), ([512, 1024, 2560], 4, 1.47)],
)
def test_packs_on_which_a_per_document_balancer_fails(lengths, ring, peer):
    work, tokens, _ = balance(build(lengths, ring))
    assert work <= WORK_LIMIT < peer
    assert tokens <= TOKEN_LIMIT


@pytest.mark.parametrize(
    ("lengths", "ring", "cuts"),
    [([100, 100, 30], 2, 1), ([4096, 60, 40, 50, 50], 2, 1), ([700] * 4, 4, 0), ([9000], 8, 1)],
)
def test_no_more_documents_are_cut_than_it_takes(lengths, ring, cuts):
    work, tokens, found = balance(build(lengths, ring))
    assert (work <= WORK_LIMIT, tokens <= TOKEN_LIMIT, found) == (True, True, cuts)


def fewest_cuts(lengths, ring):
    """By trying everything: the fewest documents spread evenly so that the rest fits whole."""
    total, work = sum(lengths), [n * (n + 1) / 2 for n in lengths]
    for cuts in range(len(lengths) + 1):
        for cut in combinations(range(len(lengths)), cuts):
            rest = [i for i in range(len(lengths)) if i not in cut]
            for places in product(range(ring), repeat=len(rest)):
                tokens = [sum(lengths[i] for i in cut) / ring] * ring
                pairs = [sum(work[i] for i in cut) / ring] * ring
                for i, rank in zip(rest, places, strict=True):
                    tokens[rank] += lengths[i]
                    pairs[rank] += work[i]
                if max(tokens) * ring <= TOKEN_LIMIT * total and max(pairs) * ring <= WORK_LIMIT * sum(work):
                    return cuts
    raise AssertionError("cutting all of them is even")


@pytest.mark.parametrize(("ring", "count"), [(2, 7), (3, 6)])
def test_as_few_cuts_as_exhaustive_search(ring, count):
    generator = np.random.default_rng(3)
    for _ in range(12):
        lengths = [int(n) * 12 for n in np.exp(generator.normal(4.0, 1.0, size=count)) + 2]
        assert balance(build(lengths, ring))[2] <= fewest_cuts(lengths, ring), lengths


@SETTINGS
@given(st.integers(2, 8), st.integers(0, 1000), st.integers(32_000, 200_000))
def test_long_tail_packs_are_even(ring, seed, total):
    generator = np.random.default_rng(seed)
    lengths = []
    while sum(lengths) < total:
        lengths.append(int(min(np.exp(generator.normal(6.5, 1.3)) + 1, total - sum(lengths))))
    work, tokens, _ = balance(build(lengths, ring))
    assert work <= WORK_LIMIT and tokens <= TOKEN_LIMIT


def test_building_again_gives_the_same_layout():
    lengths = [977, 13, 4100, 255, 255, 1, 60]
    first, second = (build(lengths, 3, 2) for _ in range(2))
    assert first.segments == second.segments
    assert tokens_of(first) == tokens_of(second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [[0], [0, 0], np.array([0, 0, 0]), torch.tensor([0])])
def test_no_tokens_at_all(offsets, kind):
    layout = SequenceLayout.build(offsets, ring=2, ulysses=2, ring_rank=1, ulysses_rank=1, kind=kind)
    assert layout.token_index.tolist() == [] and layout.num_tokens == 0


@pytest.mark.parametrize(
    "offsets", [[0, 5, 9], np.array([0, 5, 9]), torch.tensor([0, 5, 9], dtype=torch.int32)]
)
def test_offsets_come_as_list_array_or_tensor(offsets):
    layout = SequenceLayout.build(offsets, ring=1, ulysses=2, ring_rank=0, ulysses_rank=1)
    assert layout.token_index.dtype == torch.int64
    assert layout.token_index.tolist() == [5, 6, 7, 8]
    assert layout.cu_seqlens.dtype == torch.int32 and layout.cu_seqlens.tolist() == [0, 5, 9]


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1, 5], "cu_seqlens starts at 1; the first document must start at 0"),
        ([0, 5, 3], "cu_seqlens decreases from 5 to 3 at index 2"),
        ([], "cu_seqlens has shape"),
        ([[0, 1]], "cu_seqlens has shape"),
        ([0.0, 1.0], "whole numbers"),
        ([0, 2**33], "at most 2147483647"),
    ],
)
def test_bad_offsets_are_named(offsets, words):
    with pytest.raises(ConfigError, match=words):
        SequenceLayout.build(offsets, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ring": 0}, "ring=0 must be at least 1"),
        ({"ring_rank": 2}, "ring_rank=2 is outside 0 .. ring - 1 = 1"),
        ({"ulysses_rank": -1}, "ulysses_rank=-1 is outside"),
        ({"kind": "striped"}, r"kind='striped' is unknown; choose one of \['balanced'"),
    ],
)
def test_bad_ranks_and_kinds_are_named(change, words):
    fields = {"ring": 2, "ulysses": 1, "ring_rank": 0, "ulysses_rank": 0} | change
    with pytest.raises(ConfigError, match=words):
        SequenceLayout.build([0, 8], **fields)
