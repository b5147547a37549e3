"""Cutting and packing: literals, and what holds for every corpus."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import packing
from longctx.data.packing import Piece, Pieces, StepPacks, assign, best_fit, cut, cut_documents, work
from longctx.errors import ConfigError, DataError

corpora = st.lists(st.integers(0, 90), min_size=1, max_size=60)
cuts = st.fixed_dictionaries(
    {"seq_len": st.integers(1, 32), "tail": st.sampled_from(["keep", "drop"]), "min_len": st.integers(0, 8)}
).filter(lambda c: c["min_len"] <= c["seq_len"])


def pieces_of(lengths, seq_len, *, tail="keep", min_len=1) -> Pieces:
    numbers = np.arange(len(lengths)) * 2 + 5  # store numbers need not be 0, 1, ...
    return cut_documents(numbers, np.array(lengths), seq_len=seq_len, tail=tail, min_len=min_len)


def packer(lengths, seq_len=32, *, budget=32, seed=0, packs_per_step=3) -> StepPacks:
    pieces = pieces_of(lengths, seq_len)
    return StepPacks(pieces, seed=seed, microbatch_tokens=budget, packs_per_step=packs_per_step)


def epoch_of(packs: StepPacks, epoch: int) -> list:
    """All packs of an epoch, through the steps that hold them."""
    first = sum(packs.epoch_packs(e) for e in range(epoch))
    last = first + packs.epoch_packs(epoch)
    steps = range(first // packs.packs_per_step, -(-last // packs.packs_per_step))
    stream = [pack for step in steps for pack in packs.packs(step)]
    return list(islice(stream, first % packs.packs_per_step, None))[: last - first]


@pytest.mark.parametrize(
    ("num_tokens", "tail", "min_len", "wanted"),
    [
        (20, "keep", 2, [(0, 8), (8, 8), (16, 4)]),
        (20, "drop", 2, [(0, 8), (8, 8)]),
        (5, "drop", 2, [(0, 5)]),
        (16, "keep", 2, [(0, 8), (8, 8)]),
        (17, "keep", 2, [(0, 8), (8, 8)]),
        (17, "keep", 1, [(0, 8), (8, 8), (16, 1)]),
        (3, "keep", 4, []),
        (0, "keep", 0, []),
    ],
)
def test_cut_literally(num_tokens, tail, min_len, wanted):
    assert cut(num_tokens, 8, tail=tail, min_len=min_len) == wanted


@given(corpora, cuts)
def test_cutting_many_documents_is_cutting_each(lengths, how):
    pieces = pieces_of(lengths, **how)
    rows = list(zip(pieces.doc.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))
    assert rows == [(2 * i + 5, *piece) for i, n in enumerate(lengths) for piece in cut(n, **how)]


@given(corpora, cuts)
def test_cut_covers_a_document_up_to_the_tail_policy(lengths, how):
    for length in lengths:
        covered = [t for start, n in cut(length, **how) for t in range(start, start + n)]
        full = length - length % how["seq_len"]
        rest = length - full
        kept = rest >= how["min_len"] and (how["tail"] == "keep" or not full)
        assert covered == list(range(length if kept else full))


def test_best_fit_literally():
    assert best_fit([5, 3, 8, 2, 4, 4], 8) == [[2], [0, 1], [4, 5], [3]]
    assert best_fit([], 8) == []


@given(st.lists(st.integers(1, 32), max_size=80))
def test_best_fit_places_everything_once_and_no_two_bins_could_merge(lengths):
    bins = best_fit(lengths, 32)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    fills = sorted(sum(lengths[item] for item in members) for members in bins)
    assert all(fill <= 32 for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > 32


@settings(deadline=None)
@given(corpora, st.integers(0, 3), st.integers(1, 5), st.integers(2, 9))
def test_every_epoch_holds_every_token_once(lengths, seed, packs_per_step, window):
    if not sum(lengths):
        return
    with pytest.MonkeyPatch.context() as patch:  # several windows, with pieces carried over
        patch.setattr(packing, "WINDOW", window)
        patch.setattr(packing, "_CARRY", window // 2)
        packs = packer(lengths, seed=seed, packs_per_step=packs_per_step)
        for epoch in range(3):
            made = epoch_of(packs, epoch)
            assert all(0 < sum(piece.length for piece in pack) <= 32 for pack in made)
            tokens = Counter(
                (p.doc, t) for pack in made for p in pack for t in range(p.start, p.start + p.length)
            )
            wanted = Counter((2 * i + 5, t) for i, n in enumerate(lengths) for t in range(n))
            assert tokens == wanted


@settings(deadline=None)
@given(corpora.filter(sum), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 5))
def test_a_step_does_not_depend_on_what_was_asked_before(lengths, steps, seed):
    used = packer(lengths, seed=seed)
    found = [used.packs(step) for step in steps]
    assert found == [packer(lengths, seed=seed).packs(step) for step in steps]


@given(corpora.filter(sum), st.integers(0, 10), st.integers(1, 9))
def test_every_pack_of_a_step_is_assigned_once_whatever_the_number_of_groups(lengths, step, num_groups):
    packs = packer(lengths, packs_per_step=5).packs(step)
    shares = [assign(packs, group=g, num_groups=num_groups) for g in range(num_groups)]
    assert {len(share) for share in shares} == {-(-5 // num_groups)}
    assert sorted(pack for share in shares for pack in share if pack) == sorted(packs)


def test_assign_literally():
    lengths = [1, 5, 3, 4, 2]
    packs = [(Piece(n, 0, n),) for n in lengths]
    shares = [assign(packs, group=g, num_groups=2) for g in range(2)]
    assert [[pack[0].length if pack else 0 for pack in share] for share in shares] == [[5, 2, 1], [4, 3, 0]]


def test_assign_balances_attention_work():
    packs = packer([90, 40, 3, 9, 27, 60, 11, 32, 32, 1, 70] * 9, packs_per_step=32).packs(0)
    works = [sum(map(work, assign(packs, group=g, num_groups=4))) for g in range(4)]
    assert max(works) <= 1.05 * sum(works) / 4


def test_seeds_and_epochs_have_orders_of_their_own():
    lengths = list(range(1, 33)) * 4
    orders = [epoch_of(packer(lengths, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_fixed_for_good():
    """A run resumed under another version of numpy or of this program must see the same documents."""
    packs = packer([3, 70, 10, 33, 8, 20, 5], seed=7)
    assert packs.packs(0) == FIRST and packs.packs(5) == SIXTH


FIRST = [
    (Piece(13, 0, 8), Piece(7, 64, 6), Piece(17, 0, 5), Piece(5, 0, 3)),
    (Piece(11, 0, 32),),
    (Piece(7, 0, 32),),
]
SIXTH = [(Piece(7, 32, 32),), (Piece(15, 0, 20), Piece(9, 0, 10), Piece(11, 32, 1)), (Piece(7, 0, 32),)]


def test_windows_fill_packs_and_carry_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 64)
    monkeypatch.setattr(packing, "_CARRY", 16)
    lengths = np.random.default_rng(0).integers(1, 400, size=2000)
    packs = packer(lengths, seq_len=512, budget=512)
    assert packs.fill() > 0.97 and packs.fill(1) > 0.97


def test_documents_that_no_pack_can_combine_are_not_carried_forever(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 8)
    monkeypatch.setattr(packing, "_CARRY", 2)
    packs = packer([20] * 100)
    assert packs.epoch_packs(0) == 100 and packs.fill() == 20 / 32


def test_first_step_needs_one_window_only(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 16)
    windows = []
    monkeypatch.setattr(packing, "best_fit", lambda *a, keep=best_fit: windows.append(1) or keep(*a))
    packer([32] * 1000, packs_per_step=4).packs(0)
    assert len(windows) == 1


def test_impossible_budgets_are_instructions():
    with pytest.raises(ConfigError, match=r"piece of 32 tokens .* train.microbatch_tokens=16; raise"):
        packer([40], budget=16)
    with pytest.raises(ConfigError, match=r"train.global_batch_tokens is below train.microbatch_tokens=32"):
        packer([40], packs_per_step=0)
    with pytest.raises(ConfigError, match=r"data.min_len=9 is above data.seq_len=8"):
        pieces_of([40], 8, min_len=9)
    with pytest.raises(DataError, match=r"no document to train on has at least data.min_len"):
        packer([0])
