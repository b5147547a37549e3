"""Held-out split, hashing, and the length histogram."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.data.histogram import LengthClass, histogram_text, length_classes
from longctx.data.split import hash_key, hash_numbers, split

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50).map(lambda h: np.array(h, np.uint64))


def test_splitmix_reference_values():
    """First outputs of the published generator for seed 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash_numbers(np.arange(3), 1234567).tolist() == wanted


def test_keys_depend_on_every_part_and_on_order():
    keys = {hash_key(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 3)]}
    assert len(keys) == 6 and all(0 <= key < 2**64 for key in keys)


@given(hashes, st.floats(0, 0.99))
def test_split_is_a_partition_with_both_sides_where_possible(values, held_out):
    train, kept = split(values, held_out)
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(len(values)))
    assert len(train) > 0
    assert bool(len(kept)) == (held_out > 0 and len(set(values.tolist())) > 1)


@given(hashes, st.floats(0.01, 0.99))
def test_equal_documents_are_on_the_same_side(values, held_out):
    doubled = np.concatenate([values, values])
    kept = set(split(doubled, held_out)[1].tolist())
    assert {i + len(values) for i in kept if i < len(values)} == {i for i in kept if i >= len(values)}


def test_more_documents_do_not_move_the_others():
    values = hash_numbers(np.arange(5000))
    few, many = split(values[:3000], 0.05)[1], split(values, 0.05)[1]
    assert few.tolist() == [i for i in many.tolist() if i < 3000]
    assert len(many) == pytest.approx(250, abs=60)


def test_length_classes_literally():
    assert length_classes(np.array([1, 2, 3, 8, 0])) == [
        LengthClass(low=1, documents=1, tokens=1),
        LengthClass(low=2, documents=2, tokens=5),
        LengthClass(low=4, documents=0, tokens=0),
        LengthClass(low=8, documents=1, tokens=8),
    ]
    assert length_classes(np.zeros(0, np.int64)) == []


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=60))
def test_length_classes_hold_every_document_once(lengths):
    classes = length_classes(np.array(lengths))
    assert [c.documents for c in classes] == [sum(c.low <= n < 2 * c.low for n in lengths) for c in classes]
    assert sum(c.documents for c in classes) == len(lengths)
    assert sum(c.tokens for c in classes) == sum(lengths)


def test_histogram_says_how_many_documents_reach_the_sequence_length():
    text = histogram_text(np.array([10, 100, 890]), seq_len=100)
    assert (
        "3 documents, 1,000 tokens; 2 documents (66.7%) with 99.0% of the tokens reach data.seq_len=100"
        in text
    )
    assert "512 to 1,023           1              890   89.0%" in text
