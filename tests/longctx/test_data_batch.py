"""Batches as tensors, literally."""

import pytest
import torch
from stores import make_store

from longctx.data.batch import LocalBatch, PackedBatch, build_batch
from longctx.data.packing import Piece
from longctx.errors import DataError

DOCUMENTS = [[5, 6, 7, 8, 9, 256], [1, 2, 256], [256]]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", DOCUMENTS)


def as_lists(batch) -> dict:
    return {
        name: getattr(batch, name).tolist()
        for name in ("input_ids", "targets", "position_ids", "rope_id", "loss_mask")
    }


def test_whole_documents_and_pieces(store):
    batch = build_batch(store, (Piece(1, 0, 3), Piece(0, 0, 4), Piece(0, 4, 2)), vocab_size=257)
    assert as_lists(batch) == {
        "input_ids": [1, 2, 256, 5, 6, 7, 8, 9, 256],
        "targets": [2, 256, 0, 6, 7, 8, 9, 256, 0],
        "position_ids": [0, 1, 2, 0, 1, 2, 3, 0, 1],
        "rope_id": [0] * 9,
        "loss_mask": [True, True, False, True, True, True, True, True, False],
    }
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 9]
    assert batch.doc_ids == (1, 0, 0) and batch.num_tokens == 9


def test_types(store):
    batch = build_batch(store, (Piece(0, 0, 6),))
    wide = {"input_ids", "targets", "position_ids", "rope_id"}
    assert {name for name in wide if getattr(batch, name).dtype == torch.int64} == wide
    assert batch.loss_mask.dtype == torch.bool and batch.cu_seqlens.dtype == torch.int32


def test_document_of_one_token_predicts_nothing(store):
    batch = build_batch(store, (Piece(2, 0, 1),))
    assert batch.targets.tolist() == [0] and batch.loss_mask.tolist() == [False]


def test_take_picks_a_ranks_tokens_in_its_order(store):
    batch = build_batch(store, (Piece(0, 0, 6), Piece(1, 0, 3)))
    local = batch.take(torch.tensor([7, 0, 5]))
    assert isinstance(local, LocalBatch) and local.num_tokens == 3
    assert as_lists(local) == {
        "input_ids": [2, 5, 256],
        "targets": [256, 6, 0],
        "position_ids": [1, 0, 5],
        "rope_id": [0, 0, 0],
        "loss_mask": [True, True, False],
    }
    moved = local.to("cpu")
    assert as_lists(moved) == as_lists(local)


def test_empty_batch_has_the_types_of_a_full_one(store):
    empty, full = build_batch(store, ()), build_batch(store, (Piece(0, 0, 6),))
    assert empty.num_tokens == 0 and empty.cu_seqlens.tolist() == [0] and empty.doc_ids == ()
    names = ("input_ids", "targets", "position_ids", "rope_id", "loss_mask", "cu_seqlens")
    assert [getattr(empty, n).dtype for n in names] == [getattr(full, n).dtype for n in names]
    nothing = PackedBatch.empty().take(torch.zeros(0, dtype=torch.int64))
    assert nothing.num_tokens == 0 and nothing.input_ids.shape == (0,)


def test_token_outside_the_model_names_its_document(store):
    pieces = (Piece(1, 0, 1), Piece(0, 0, 6))
    with pytest.raises(DataError, match=r"token 256 in doc0 is not in model.vocab_size=256; .* at least 257"):
        build_batch(store, pieces, vocab_size=256)


def test_only_the_target_may_be_outside_too(store):
    """The last target of a piece is a token that the piece itself does not hold."""
    with pytest.raises(DataError, match="token 256 in doc0"):
        build_batch(store, (Piece(0, 0, 5),), vocab_size=256)
