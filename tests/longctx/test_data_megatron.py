"""The store's format is Megatron-core's: each side reads what the other wrote."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import make_store

from longctx.config.schema import DataConfig
from longctx.data.index import token_dtype
from longctx.data.prepare import prepare
from longctx.data.store import Store
from longctx.errors import DataError

with warnings.catch_warnings(action="ignore"):  # it misses Transformer Engine
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WIDE = [[70000, 3, 9], [1], [5, 69999]]
documents = st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=9), min_size=1, max_size=6)


def write_with_megatron(prefix, documents, dtype=np.int32):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents)
def test_megatron_reads_ours(tmp_path, documents):
    make_store(tmp_path / "s", documents)
    theirs = IndexedDataset(str(tmp_path / "s"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.get(0, offset=0, length=1).tolist() == documents[0][:1]


def test_megatron_reads_ours_with_a_large_vocabulary(tmp_path):
    make_store(tmp_path / "s", WIDE, vocab_size=70001)
    theirs = IndexedDataset(str(tmp_path / "s"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == WIDE


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents)
def test_we_read_megatrons(tmp_path, documents):
    write_with_megatron(tmp_path / "m", documents, np.uint16)
    store = Store(str(tmp_path / "m"))
    assert [store.document(i).tolist() for i in range(len(store))] == documents


def test_we_read_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_item(torch.tensor([6]))
    builder.add_item(torch.tensor([7, 8]))
    builder.end_document()
    builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    store = Store(str(tmp_path / "m"))
    assert [store.document(i).tolist() for i in range(len(store))] == [[1, 2, 3, 4, 5], [6, 7, 8], []]


def test_we_read_multimodal_files(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    assert Store(str(tmp_path / "m")).document(0).tolist() == [1, 2]


@pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 128256])
def test_we_pick_the_same_token_type(vocab_size):
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_a_megatron_prefix_is_trained_on_directly(tmp_path):
    write_with_megatron(tmp_path / "m", WIDE)
    prepared = prepare(DataConfig(path=str(tmp_path / "m"), held_out=0.4), progress=False)
    assert prepared.prefix == str(tmp_path / "m") and not prepared.created
    assert prepared.vocab_size == 70001 and prepared.tokenizer is None
    assert sorted([*prepared.train_docs, *prepared.held_out_docs]) == [0, 1, 2] and len(
        prepared.held_out_docs
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.idx"]


def test_truncated_megatron_files_are_named(tmp_path):
    write_with_megatron(tmp_path / "m", WIDE)
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-4])
    with pytest.raises(DataError, match=r"m.bin has 20 bytes, its index describes 24"):
        prepare(DataConfig(path=str(tmp_path / "m.bin")), progress=False)
