"""The first corpus a user meets, from its files to the batches of a step."""

import subprocess
import sys

import pytest

from longctx.config.schema import DataConfig
from longctx.data.held_out import held_out_batches, held_out_packs
from longctx.data.loader import StepLoader, step_packs
from longctx.data.prepare import prepare
from longctx.data.store import Store

PURE = ("documents", "tokenizers", "store", "prepare", "packing", "histogram", "split", "spans")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    config = DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")), seq_len=8192, workers=1)
    prepared = prepare(config, progress=False)
    return config, prepared, Store(prepared.prefix)


def test_hundreds_of_documents_of_all_lengths(corpus):
    _, prepared, store = corpus
    assert len(store) > 400 and prepared.num_tokens > 5_000_000 and not prepared.skipped
    assert store.lengths.min() < 256 and store.lengths.max() > 100_000
    assert 1 <= len(prepared.held_out_docs) < 0.1 * len(store)


def test_packs_are_full(corpus):
    config, prepared, store = corpus
    for budget in (8192, 32768):
        packs = step_packs(
            store, prepared.train_docs, config, seed=0, microbatch_tokens=budget, global_batch_tokens=budget
        )
        assert packs.fill() >= 0.97


def test_step_and_evaluation(corpus):
    config, prepared, store = corpus
    packs = step_packs(
        store, prepared.train_docs, config, seed=0, microbatch_tokens=8192, global_batch_tokens=32768
    )
    with StepLoader(store, packs, vocab_size=prepared.vocab_size) as loader:
        batches = loader.step(0)
        assert len(batches) == 4 and all(
            name.partition(" ")[0].endswith(".py") for name in loader.documents(0)
        )
    assert sum(batch.num_tokens for batch in batches) >= 0.9 * 32768
    held_out = held_out_packs(
        store, prepared.held_out_docs, config, microbatch_tokens=8192, eval_tokens=65536
    )
    for each in held_out_batches(store, held_out, vocab_size=prepared.vocab_size):
        # A byte is a token: targets are bytes, and one end of document for each first byte left out.
        assert each.text_bytes == pytest.approx(int(each.batch.loss_mask.sum()))
        assert not set(each.batch.doc_ids) & set(prepared.train_docs.tolist())


def test_no_torch_before_there_are_batches():
    modules = ", ".join(f"longctx.data.{name}" for name in PURE)
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
