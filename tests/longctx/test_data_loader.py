"""The loader: shares of a step, reading ahead, errors, held-out batches."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import make_store

from longctx.config.schema import DataConfig
from longctx.data import loader as loader_module
from longctx.data.held_out import held_out_batches, held_out_packs
from longctx.data.loader import StepLoader, step_packs
from longctx.data.tokenizers import load_tokenizer
from longctx.errors import DataError

CONFIG = DataConfig(seq_len=16, min_len=2)


def make_documents(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(0, 256, size=n).tolist(), 256] for n in rng.integers(1, 60, size=count)]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", make_documents(40))


def packs_of(store, *, seed=0, microbatch=32, batch=128):
    documents = np.arange(0, len(store), 2)
    return step_packs(
        store, documents, CONFIG, seed=seed, microbatch_tokens=microbatch, global_batch_tokens=batch
    )


def tokens_of(batches) -> list:
    """(document, its tokens) of every piece, sorted."""
    found = []
    for batch in batches:
        edges = batch.cu_seqlens.tolist()
        for doc, first, last in zip(batch.doc_ids, edges, edges[1:], strict=False):
            found.append((doc, batch.input_ids[first:last].tolist()))
    return sorted(found)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(1, 6))
def test_groups_together_hold_the_step_and_have_equal_counts(store, step, num_groups):
    shares = []
    for group in range(num_groups):
        with StepLoader(
            store, packs_of(store), data_group_index=group, num_data_groups=num_groups, vocab_size=257
        ) as loader:
            shares.append(loader.step(step))
    assert {len(share) for share in shares} == {-(-4 // num_groups)}
    with StepLoader(store, packs_of(store)) as alone:
        assert tokens_of(batch for share in shares for batch in share) == tokens_of(alone.step(step))


class Moved:
    """The packs of later steps."""

    def __init__(self, packs):
        self._packs, self.by = packs, 0

    def packs(self, step):
        return self._packs.packs(step + self.by)


def test_what_was_read_ahead_is_read_anew_once_it_is_forgotten(store):
    with StepLoader(store, packs_of(store)) as loader:
        expected = tokens_of(loader.step(8))
    packs = Moved(packs_of(store))
    with StepLoader(store, packs) as loader:
        loader.step(0)
        loader.forget()
        packs.by = 7
        assert tokens_of(loader.step(1)) == expected


def test_steps_in_any_order_are_the_steps_in_order(store):
    with StepLoader(store, packs_of(store)) as loader:
        ordered = [tokens_of(loader.step(step)) for step in range(6)]
    with StepLoader(store, packs_of(store)) as loader:
        assert [tokens_of(loader.step(step)) for step in (4, 5, 0, 3, 3)] == [
            ordered[step] for step in (4, 5, 0, 3, 3)
        ]


def test_only_the_chosen_documents_are_trained(store):
    with StepLoader(store, packs_of(store)) as loader:
        seen = {doc for step in range(30) for batch in loader.step(step) for doc in batch.doc_ids}
    assert seen == set(range(0, 40, 2))


def test_next_step_is_read_while_the_caller_works(store, monkeypatch):
    built = threading.Event()
    original = loader_module.build_batch

    def build(*args, **kwargs):
        batch = original(*args, **kwargs)
        if threading.current_thread().name.startswith("longctx-loader"):
            counted.append(1)
            if len(counted) == 8:
                built.set()
        return batch

    counted: list[int] = []
    monkeypatch.setattr(loader_module, "build_batch", build)
    with StepLoader(store, packs_of(store)) as loader:
        assert len(loader.step(0)) == 4
        assert built.wait(20), "step 1 was not read before it was asked for"
        assert loader.wait_s > 0


def test_error_in_the_thread_reaches_the_caller_and_the_next_step_still_works(tmp_path):
    store = make_store(tmp_path / "s", [[1, 2, 3, 256], [1, 300, 256]], vocab_size=301)
    packs = step_packs(store, np.arange(2), CONFIG, seed=0, microbatch_tokens=16, global_batch_tokens=16)
    with StepLoader(store, packs, vocab_size=257) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"token 300 in doc1 is not in model.vocab_size=257"):
                loader.step(0)
    with StepLoader(store, packs, vocab_size=301) as loader:
        assert tokens_of(loader.step(0)) == [(0, [1, 2, 3, 256]), (1, [1, 300, 256])]


def test_documents_of_a_step_are_named_for_all_groups(store):
    with StepLoader(store, packs_of(store), data_group_index=1, num_data_groups=2) as loader:
        names = loader.documents(3)
        pieces = [piece for pack in loader.packs(3) for piece in pack]
    assert names == [f"doc{p.doc} [{p.start}:{p.start + p.length}]" for p in pieces]


def held_out(store, *, eval_tokens=10**6, groups=1, **more):
    documents = np.arange(1, len(store), 2)
    packs = held_out_packs(store, documents, CONFIG, microbatch_tokens=32, eval_tokens=eval_tokens)
    return [
        held_out_batches(store, packs, data_group_index=g, num_data_groups=groups, **more)
        for g in range(groups)
    ]


def test_held_out_batches_count_the_text_of_whole_documents_exactly(store):
    (batches,) = held_out(store)
    assert {doc for b in batches for doc in b.batch.doc_ids} == set(range(1, 40, 2))
    assert sum(b.text_bytes for b in batches) == pytest.approx(int(store.text_bytes[1::2].sum()), rel=1e-12)
    trained = sum(int(b.batch.loss_mask.sum()) for b in batches)
    assert trained == int((store.lengths[1::2] - 1).sum())


def test_held_out_batches_are_shared_out_with_equal_counts(store):
    (alone,), shares = held_out(store), held_out(store, groups=3)
    assert len({len(share) for share in shares}) == 1
    everything = [b for share in shares for b in share]
    assert tokens_of(b.batch for b in everything) == tokens_of(b.batch for b in alone)
    assert sum(b.text_bytes for b in everything) == pytest.approx(sum(b.text_bytes for b in alone))


@pytest.mark.parametrize("eval_tokens", [1, 100, 300])
def test_held_out_budget_is_kept_but_never_empty(store, eval_tokens):
    (batches,) = held_out(store, eval_tokens=eval_tokens)
    tokens = sum(b.batch.num_tokens for b in batches)
    assert 0 < tokens <= max(eval_tokens, CONFIG.seq_len)
    assert sum(b.text_bytes for b in batches) <= tokens


def test_text_bytes_of_a_store_without_a_record_come_from_the_tokenizer(tmp_path):
    recorded = make_store(tmp_path / "s", [[*"ab\u00fc".encode(), 256], [*b"held out", 256]])
    for suffix in (".json", ".documents.npy", ".files.jsonl"):
        (tmp_path / f"s{suffix}").unlink()
    foreign = type(recorded)(str(tmp_path / "s"))
    assert [b.text_bytes for b in held_out(foreign)[0]] == [None]
    assert [b.text_bytes for b in held_out(foreign, tokenizer=load_tokenizer("bytes"))[0]] == [8.0]
