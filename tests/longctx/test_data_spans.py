"""Loss spans beside a store: which tokens are trained."""

import struct

import pytest
import xxhash
from stores import flip_bit, make_store

from longctx.data.batch import build_batch
from longctx.data.packing import Piece
from longctx.data.spans import write_spans
from longctx.data.store import Store
from longctx.errors import DataError

DOCUMENTS = [[10, 11, 12, 13, 14, 256], [20, 21, 256], [30, 31, 256]]
SPANS = [[(1, 3), (4, 6)], [], [(0, 3)]]


@pytest.fixture
def prefix(tmp_path):
    make_store(tmp_path / "s", DOCUMENTS)
    write_spans(str(tmp_path / "s"), SPANS)
    return str(tmp_path / "s")


def test_mask_is_that_of_the_target_token(prefix):
    batch = build_batch(Store(prefix), (Piece(0, 0, 6), Piece(1, 0, 3), Piece(2, 0, 3)))
    trained = [
        target for target, on in zip(batch.targets.tolist(), batch.loss_mask.tolist(), strict=True) if on
    ]
    assert trained == [11, 12, 14, 256, 31, 256]


def test_mask_of_a_piece_inside_a_document(prefix):
    batch = build_batch(Store(prefix), (Piece(0, 2, 2),))
    assert batch.targets.tolist() == [13, 14] and batch.loss_mask.tolist() == [False, True]


def test_file_literally(prefix):
    with open(prefix + ".idx", "rb") as file:
        index = xxhash.xxh3_64_intdigest(file.read())
    body = struct.pack("<8sQQQQ", b"LCSPANS\0", 1, index, 3, 3) + struct.pack("<4q", 0, 2, 2, 3)
    body += struct.pack("<6q", 1, 3, 4, 6, 0, 3)
    with open(prefix + ".spans", "rb") as file:
        assert file.read() == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def test_no_file_means_every_token(tmp_path):
    store = make_store(tmp_path / "s", DOCUMENTS)
    assert store.spans is None


@pytest.mark.parametrize("offset", [0, 8, 60, -1])
def test_damage_is_named(prefix, tmp_path, offset):
    flip_bit(tmp_path / "s.spans", offset)
    with pytest.raises(DataError, match=r"s.spans"):
        _ = Store(prefix).spans


def test_spans_of_another_store_are_refused(prefix, tmp_path):
    make_store(tmp_path / "s", [*DOCUMENTS[:2], [30, 256, 256, 256]])
    with pytest.raises(DataError, match="belongs to another store; write the spans again"):
        _ = Store(prefix).spans


@pytest.mark.parametrize(
    ("spans", "named"),
    [
        ([[(1, 7)], [], []], r"span 1..7 of document 0"),
        ([[], [(2, 1)], []], r"span 2..1 of document 1"),
        ([[], [], [(0, 2), (1, 3)]], r"span 1..3 of document 2"),
    ],
)
def test_impossible_spans_are_named(prefix, spans, named):
    write_spans(prefix, spans)
    with pytest.raises(DataError, match=named):
        _ = Store(prefix).spans
