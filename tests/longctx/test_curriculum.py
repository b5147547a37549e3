"""Counts of pieces: shares, budgets, cycles, limits, and any step reached from anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.curriculum import Buckets, Curriculum, Wanted
from longctx.data.rounding import water_fill
from longctx.data.weights import LossWeights
from longctx.errors import DataError, OutOfData

KINDS = [
    "natural",
    "uniform",
    "weights",
    *(f"{direction}-{form}" for direction in ("grow", "shrink") for form in ("linear", "p2", "p100")),
]
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
BUDGET = 64 * 8192


def buckets(pieces=(900, 700, 500, 300, 200, 100), *, sources=1, epochs=10**6) -> Buckets:
    count = np.array(list(pieces) * sources)
    return Buckets(
        source=np.repeat(np.arange(sources), len(pieces)),
        length=np.array(LENGTHS[: len(pieces)] * sources),
        pieces=count,
        limit=(count * epochs).astype(np.int64),
    )


def make(kind="natural", mode="mixed", *, steps=40, seed=0, budget=BUDGET, of=None, **more) -> Curriculum:
    if kind == "weights":
        more.setdefault("class_weights", {256: 1.0, 8192: 3.0})
    return Curriculum(
        of or buckets(), Wanted(kind=kind, mode=mode, **more), seed=seed, step_tokens=budget, steps=steps
    )


def drawn(curriculum: Curriculum, steps: int) -> np.ndarray:
    """Pieces [steps, b]."""
    return np.array([curriculum.draw(step)[1] for step in range(steps)])


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_exactly_its_tokens_and_one_bucket_one_length(kind, mode):
    counts = drawn(make(kind, mode, cycles=3), 40)
    assert (counts >= 0).all()
    assert (counts @ np.array(LENGTHS) == BUDGET).all()
    if mode == "one_bucket":
        assert ((counts > 0).sum(axis=1) == 1).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(["mixed", "one_bucket"]), st.lists(st.integers(0, 700)))
def test_any_step_in_any_order_is_the_step_of_the_run(kind, mode, order):
    expected = drawn(make(kind, mode, steps=600, cycles=2), 701)
    curriculum = make(kind, mode, steps=600, cycles=2)
    before = np.cumsum(expected, axis=0) - expected
    for step in order:
        first, counts = curriculum.draw(step)
        assert first.tolist() == before[step].tolist()
        assert counts.tolist() == expected[step].tolist()


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
@pytest.mark.parametrize("kind", ["natural", "uniform", "weights"])
def test_shares_over_a_million_pieces_are_within_half_a_percent_of_the_weights(kind, mode):
    of = buckets(sources=2)
    sources = {"source_weights": lambda step: (0.3, 0.7), "source_names": ("a", "b")}
    steps = 600
    curriculum = make(kind, mode, steps=steps, of=of, **sources)
    counts = drawn(curriculum, steps)
    while counts.sum() < 1_000_000:
        more = range(len(counts), len(counts) + 600)
        counts = np.concatenate([counts, [curriculum.draw(step)[1] for step in more]])
    tokens = (counts * of.length).sum(axis=0).reshape(2, 6) / (len(counts) * BUDGET)
    wanted = {
        "natural": of.tokens[:6] / of.tokens[:6].sum(),
        "uniform": np.full(6, 1 / 6),
        "weights": np.array([0.25, 0, 0, 0, 0, 0.75]),
    }[kind]
    assert np.abs(tokens - np.outer([0.3, 0.7], wanted)).max() < 0.005
    assert np.abs(tokens.sum(axis=1) - [0.3, 0.7]).max() < 0.005


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
@pytest.mark.parametrize("kind", KINDS[3:])
def test_a_cycle_draws_natural_shares_and_moves_lengths(kind, mode):
    steps, cycles = 480, 4
    of = buckets()
    counts = drawn(make(kind, mode, steps=steps, cycles=cycles), steps)
    tokens = (counts * of.length).reshape(cycles, steps // cycles, 6).sum(axis=1)
    natural = of.tokens / of.tokens.sum()
    assert np.abs(tokens / tokens.sum(axis=1, keepdims=True) - natural).max() < 0.02
    mean = (counts * of.length) @ np.array(LENGTHS) / BUDGET  # token-weighted mean length of each step
    thirds = mean.reshape(cycles, 3, -1).mean(axis=(0, 2))
    low, high = (0, 2) if kind.startswith("grow") else (2, 0)
    assert 1.3 * thirds[low] < thirds[high]


def test_growth_by_powers_of_two_is_that_of_the_official_code():
    # Steps per bucket of a cycle from the official README; mean lengths by eighth of a cycle from
    # running the official sampler's rule with random draws (reference notes, section 4).
    of = buckets(tuple(np.array([736, 1248, 1552, 1312, 1072, 960]) * BUDGET // np.array(LENGTHS)))
    counts = drawn(make("grow-p2", "one_bucket", steps=6880, of=of), 6880)
    mean = ((counts * of.length) @ np.array(LENGTHS) / BUDGET).reshape(8, -1).mean(axis=1)
    official = [859, 926, 1128, 1359, 1913, 2721, 4307, 6967]
    assert mean == pytest.approx(official, rel=0.06)
    assert mean.mean() == pytest.approx(2523, rel=0.01)
    assert (counts * of.length // BUDGET).sum(axis=0) == pytest.approx(
        [736, 1248, 1552, 1312, 1072, 960], abs=2
    )


def test_a_schedule_moves_source_weights():
    of = buckets(sources=2)
    curriculum = make(
        of=of, source_weights=lambda step: (1 - step / 99, step / 99), source_names=("a", "b"), steps=100
    )
    tokens = (drawn(curriculum, 100) * of.length).reshape(100, 2, 6).sum(axis=2) / BUDGET
    assert tokens[:10, 1].mean() == pytest.approx(np.arange(10).mean() / 99, abs=0.01)
    assert tokens[90:, 1].mean() == pytest.approx(np.arange(90, 100).mean() / 99, abs=0.01)


@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("kind", ["grow-p2", "shrink-linear"])
def test_a_schedule_moves_source_weights_inside_a_cycle(kind, cycles):
    of, steps = buckets(sources=2), 300
    curriculum = make(
        kind,
        of=of,
        source_weights=lambda step: (8 - 6 * step / (steps - 1), 2 + 6 * step / (steps - 1)),
        source_names=("a", "b"),
        steps=steps,
        cycles=cycles,
    )
    tokens = (drawn(curriculum, steps) * of.length).reshape(steps, 2, 6) / BUDGET
    given = tokens.sum(axis=2).reshape(15, -1, 2).mean(axis=1)
    progress = (np.arange(steps) / (steps - 1)).reshape(15, -1).mean(axis=1)
    assert np.abs(given - np.stack([0.8 - 0.6 * progress, 0.2 + 0.6 * progress], axis=1)).max() < 0.01
    natural = of.tokens[:6] / of.tokens[:6].sum()
    for cycle in tokens.reshape(cycles, -1, 2, 6):
        inside = cycle.sum(axis=0) / cycle.sum(axis=(0, 2))[:, None]
        assert np.abs(inside - natural).max() < 0.02
        mean = cycle @ np.array(LENGTHS) / cycle.sum(axis=2)  # [steps, sources]
        fifth = len(cycle) // 5
        early, late = mean[:fifth].mean(axis=0), mean[-fifth:].mean(axis=0)
        assert ((1.3 * early < late) if kind.startswith("grow") else (early > 1.3 * late)).all()


def test_weights_that_follow_losses_act_inside_a_cycle_and_leave_earlier_steps_alone():
    of, steps = buckets(sources=2), 200

    def built(weights):
        return make("grow-p2", of=of, source_weights=weights, source_names=("a", "b"), steps=steps)

    weights = LossWeights(lambda step: [1.0, 1.0], [0.0, 0.0], every=100)
    curriculum, counts = built(weights), []
    for step in range(steps):
        counts.append(curriculum.draw(step)[1])
        changed = weights.measured(step, [(np.log(3.0), 1.0), (0.0, 1.0)])
        if changed is not None:
            curriculum.forget(changed)
    shares = (np.array(counts) * of.length).reshape(steps, 2, 6).sum(axis=2) / BUDGET
    assert shares[:102].mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares[104:].mean(axis=0) == pytest.approx([0.75, 0.25], abs=0.01)  # once times e^ln 3
    resumed = LossWeights(lambda step: [1.0, 1.0], [0.0, 0.0], every=100)
    resumed.restore(weights.state())
    assert (drawn(built(resumed), steps) == np.array(counts)).all()


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
def test_a_weight_of_zero_gives_nothing_once_limits_bind(mode):
    of = buckets((80, 80, 80), sources=2, epochs=1)  # 80 pieces of 1024 in each of two sources
    more = {"mode": mode, "budget": 8192, "source_names": ("a", "b")}
    weights = make("weights", of=of, class_weights={1024: 1.0}, source_weights=lambda s: (1, 1), **more)
    assert drawn(weights, 20).sum(axis=0).tolist() == [0, 0, 80, 0, 0, 80]
    with pytest.raises(DataError, match=r"step 21: .*weights of 0 give nothing.*train.steps to 20"):
        weights.draw(20)
    alone = make("natural", of=of, source_weights=lambda s: (1, 0), **more)
    assert not drawn(alone, 15)[:, 3:].any()
    with pytest.raises(DataError, match="weights of 0 give nothing"):
        alone.draw(20)


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
def test_an_exhausted_source_is_named_and_others_take_its_share(mode):
    one = buckets((64 * 64, 64 * 32), sources=2, epochs=1)
    budget = 64 * 512
    limit = one.limit.copy()
    limit[2:] = 10**9
    of = Buckets(source=one.source, length=one.length, pieces=one.pieces, limit=limit)
    curriculum = make(
        mode=mode, of=of, budget=budget, source_weights=lambda s: (1, 1), source_names=("a", "b"), steps=500
    )
    counts = drawn(curriculum, 500)
    assert (counts @ of.length == budget).all()
    assert counts.sum(axis=0)[:2].tolist() == of.limit[:2].tolist()
    assert curriculum.exhausted(0) == []
    assert curriculum.exhausted(500) == ["a"]


def test_nothing_left_names_the_sources_and_the_step():
    of = buckets((128,), epochs=1)
    curriculum = make(of=of, budget=16 * 256, source_names=("tiny",))
    assert len(drawn(curriculum, 8)) == 8
    with pytest.raises(DataError, match=r"step 9: .*tiny.*4,096 tokens.*max_epochs.*train.steps to 8"):
        curriculum.draw(8)


def test_a_long_replay_is_that_of_a_short_one_after_weights_change():
    weights = {"b": 1.0}
    of = buckets(sources=2)
    curriculum = make(
        of=of,
        source_weights=lambda s: (1.0, weights["b"] if s >= 300 else 1.0),
        source_names=("a", "b"),
        steps=600,
    )
    first = drawn(curriculum, 600)
    weights["b"] = 5.0
    curriculum.forget(300)
    second = drawn(curriculum, 600)
    assert (first[:300] == second[:300]).all()
    assert not (first[300:] == second[300:]).all()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_step_is_drawn_as_long_as_its_tokens_are_there(data):
    kinds = st.sampled_from(["natural", "uniform", "grow-p2", "grow-p100", "shrink-linear"])
    kind = data.draw(kinds)
    pieces = data.draw(st.lists(st.integers(1, 120), min_size=2, max_size=4))
    of = buckets(pieces, sources=2, epochs=data.draw(st.integers(1, 2)))
    budget = LENGTHS[len(pieces) - 1] * data.draw(st.integers(1, 3))
    whole = int(of.limit @ of.length) // budget
    curriculum = make(
        kind,
        of=of,
        budget=budget,
        source_weights=lambda step: (1 + step, 3),
        source_names=("a", "b"),
        steps=data.draw(st.integers(1, 80)),
    )
    counts = drawn(curriculum, whole)
    assert (counts @ of.length == budget).all() and (counts >= 0).all()
    assert (counts.sum(axis=0) <= of.limit).all()
    with pytest.raises(OutOfData):
        curriculum.draw(whole)


def test_water_fill_keeps_caps_and_totals():
    assert water_fill(np.array([1.0, 1, 2]), np.array([9.0, 9, 1]), 9).tolist() == [4, 4, 1]
    assert water_fill(np.array([1.0, 0]), np.array([3.0, 9]), 4) is None
