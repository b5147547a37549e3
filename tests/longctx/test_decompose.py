"""Pieces of documents against an oracle that shares no code: the greedy rule, digit by digit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from longctx.data import Piece, decompose
from longctx.data.batch import build_batch
from longctx.data.decomposition import decompose_documents, length_classes
from longctx.errors import ConfigError

CLASSES = st.integers(0, 6).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, low + 7)))


def oracle(num_tokens: int, low: int, high: int) -> list[tuple[int, int]]:
    """The longest power of two that still has a next token for each of its inputs, again and again."""
    pieces, start = [], 0
    while True:
        fitting = [2**k for k in range(low, high + 1) if start + 2**k + 1 <= num_tokens]
        if not fitting:
            return pieces
        pieces.append((start, fitting[-1]))
        start += fitting[-1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 70_000), CLASSES)
def test_pieces_equal_the_oracle(num_tokens, classes):
    low, high = classes
    found = decompose(num_tokens, min_len=2**low, max_len=2**high)
    assert [tuple(piece) for piece in found] == oracle(num_tokens, low, high)
    assert all(isinstance(piece, Piece) for piece in found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), CLASSES, st.sampled_from(["keep", "drop"]))
def test_many_documents_at_once_equal_one_by_one(lengths, classes, tail):
    low, high = classes
    documents = np.arange(len(lengths)) * 7
    columns = decompose_documents(documents, np.array(lengths), min_len=2**low, max_len=2**high, tail=tail)
    expected = [
        (7 * number, *piece)
        for number, tokens in enumerate(lengths)
        for piece in decompose(tokens, min_len=2**low, max_len=2**high, tail=tail)
    ]
    assert list(zip(columns.doc, columns.start, columns.length, strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200_000), CLASSES, st.integers(0, 10**6))
def test_spread_pieces_follow_each_other_and_leave_less_than_the_shortest(num_tokens, classes, key):
    low, high = classes
    low, high = low + 5, high + 5
    pieces = decompose(num_tokens, min_len=2**low, max_len=2**high, too_long="spread", key=key)
    ends = [0, *(piece.start + piece.length for piece in pieces)]
    assert [piece.start for piece in pieces] == ends[:-1]
    assert all(piece.length & (piece.length - 1) == 0 for piece in pieces)
    assert all(2**low <= piece.length <= 2**high for piece in pieces)
    assert 0 <= max(0, num_tokens - 1) - ends[-1] < 2**low


def test_spread_gives_every_class_the_same_expected_tokens():
    documents = np.arange(3000)
    pieces = decompose_documents(
        documents, np.full(3000, 1 << 17), min_len=256, max_len=8192, too_long="spread"
    )
    longest = pieces.start + pieces.length <= (1 << 17) - 1 - 2 * 8192  # drawn, not the binary rest
    tokens = np.bincount(np.log2(pieces.length[longest]).astype(int), weights=pieces.length[longest])[8:]
    assert tokens / tokens.sum() == pytest.approx(np.full(6, 1 / 6), rel=0.05)


def test_dropped_tail_is_that_of_long_documents_only():
    assert decompose(2 * 64 + 40, min_len=8, max_len=64, tail="drop") == [(0, 64), (64, 64)]
    assert decompose(41, min_len=8, max_len=64, tail="drop") == [(0, 32), (32, 8)]


def test_the_shortest_length_is_rounded_up_to_a_power_of_two():
    assert length_classes(200, 1024) == [256, 512, 1024]
    assert length_classes(2, 2) == [2]
    assert decompose(300, min_len=200, max_len=1024) == [(0, 256)]


@pytest.mark.parametrize(
    ("low", "high", "words"), [(2, 1000, ["1000", "512", "1024"]), (300, 256, ["300", "512", "256"])]
)
def test_lengths_that_cannot_be_are_refused(low, high, words):
    with pytest.raises(ConfigError) as caught:
        length_classes(low, high)
    assert all(word in str(caught.value) for word in words)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 4))
def test_every_token_of_a_piece_is_trained_on_the_next_token_of_its_document(num_tokens, low):
    import tempfile
    from pathlib import Path

    rng = np.random.default_rng(num_tokens)
    document = [*rng.integers(0, 256, size=num_tokens - 1).tolist(), 256]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "s"), [document])
        pieces = decompose_documents(np.array([0]), store.lengths, min_len=2**low, max_len=64)
        batch = build_batch(store, pieces.pack(np.arange(len(pieces))))
    expected = [
        document[start + 1 + i]
        for start, length in zip(pieces.start, pieces.length, strict=True)
        for i in range(length)
    ]
    assert batch.targets.tolist() == expected
    assert bool(batch.loss_mask.all())
