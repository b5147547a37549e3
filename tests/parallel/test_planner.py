"""Step plans: always valid, never below the bound, equal everywhere, better than one static degree."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from static_groups import static_ms

from parallel.errors import PlanError
from parallel.planner.sequence import (
    Group,
    SequenceCost,
    StepPlan,
    lower_bound,
    plan_step,
    split_degree,
    validate_plan,
)


def make_cost(num_ranks: int, capacity: int = 1000, smallest: int = 1) -> SequenceCost:
    degrees = [d for d in (1, 2, 4, 8, 16) if smallest <= d <= num_ranks]
    return SequenceCost(
        alpha1_ms=1e-5,
        alpha2_ms=1e-2,
        beta_ms=3.0,
        comm_ms_per_token={d: 0.0 if d == 1 else 1e-3 * (1 + (d > 8)) for d in degrees},
        capacity_tokens=capacity,
    )


@settings(deadline=None, max_examples=300)
@given(
    num_ranks=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    pp=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 900), max_size=40),
    effort=st.sampled_from([0.2, 1.0]),
)
def test_any_batch_that_fits_gets_a_valid_plan_above_the_bound(num_ranks, pp, lengths, effort):
    cost = make_cost(num_ranks, capacity=1000 * pp)
    plan = plan_step(lengths, num_ranks=num_ranks, cost=cost, pp=pp, effort=effort)
    validate_plan(plan, lengths, cost, pp=pp)
    assert plan.time_ms >= plan.lower_bound_ms * (1 - 1e-12)
    assert plan == plan_step(lengths, num_ranks=num_ranks, cost=cost, pp=pp, effort=effort)


@pytest.mark.parametrize("seed", range(20))
def test_long_pieces_get_wide_groups_and_time_is_what_the_cost_says(seed):
    chooser = random.Random(seed)
    lengths = [min(15000, int(chooser.lognormvariate(5.5, 1.6)) + 1) for _ in range(100)]
    cost = make_cost(16)
    plan = plan_step(lengths, num_ranks=16, cost=cost)
    validate_plan(plan, lengths, cost)
    times = []
    for groups in plan.microbatches:
        for group in groups:
            assert all(lengths[p] <= 1000 * group.degree for p in group.pieces)
        loads = [sum(cost.piece_ms(lengths[p], g.degree) for p in g.pieces) for g in groups]
        times.append(cost.beta_ms + max(loads))
    assert plan.time_ms == pytest.approx(sum(times), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_groups_beat_every_static_degree_on_long_tails(seed):
    chooser = random.Random(seed)
    lengths = [min(12000, int(chooser.lognormvariate(5.0, 1.8)) + 1) for _ in range(200)]
    cost = make_cost(16)
    static = [static_ms(lengths, d, 16, cost) for d in (1, 2, 4, 8, 16) if max(lengths) <= 1000 * d]
    assert plan_step(lengths, num_ranks=16, cost=cost).time_ms < min(static)


@settings(deadline=None, max_examples=100)
@given(
    num_ranks=st.sampled_from([2, 4, 8, 16]),
    lengths=st.lists(st.sampled_from([64, 128, 256, 512, 1000]), min_size=1, max_size=40),
    fixed_ms=st.sampled_from([0.0, 3.0]),
)
def test_no_single_degree_beats_adaptive_groups_in_small_steps(num_ranks, lengths, fixed_ms):
    cost = replace(make_cost(num_ranks), beta_ms=fixed_ms)
    plan = plan_step(lengths, num_ranks=num_ranks, cost=cost)
    for degree, comm in cost.comm_ms_per_token.items():
        alone = plan_step(lengths, num_ranks=num_ranks, cost=replace(cost, comm_ms_per_token={degree: comm}))
        assert plan.time_ms <= alone.time_ms * (1 + 1e-12), degree


@pytest.mark.parametrize("length", [0, -3])
def test_a_piece_of_less_than_one_token_is_named(length):
    with pytest.raises(PlanError, match=rf"piece 1 counts {length} tokens; every piece has at least 1"):
        plan_step([10, length, 5], num_ranks=4, cost=make_cost(4))


def test_a_piece_longer_than_all_memory_is_named_with_the_longest_that_fits():
    with pytest.raises(
        PlanError, match=r"4001 tokens does not fit: 4 ranks of 1000 tokens hold at most 4000"
    ):
        plan_step([10, 4001], num_ranks=4, cost=make_cost(4))


def random_step(seed: int) -> tuple[list[int], int, SequenceCost, int]:
    """Lengths of a long tail, ranks, cost and pipeline stages; every fifth step may hold a piece too long."""
    chooser = random.Random(seed)
    num_ranks, pp = chooser.choice([1, 2, 3, 4, 6, 8, 12, 16]), chooser.choice([1, 1, 2, 3])
    cost = make_cost(num_ranks, capacity=chooser.choice([700, 1000, 1024]) * pp)
    fits = cost.capacity_tokens // pp * max(cost.comm_ms_per_token)
    most = 2 * fits if seed % 5 == 0 else fits
    mean, sigma = chooser.uniform(3, 7), chooser.uniform(0.2, 2.0)
    drawn = (int(chooser.lognormvariate(mean, sigma)) + 1 for _ in range(chooser.randint(0, 60)))
    return [min(most, length) for length in drawn], num_ranks, cost, pp


def check_random_steps(seeds: range) -> None:
    refused = 0
    for seed in seeds:
        lengths, num_ranks, cost, pp = random_step(seed)
        fits = cost.capacity_tokens // pp * max(cost.comm_ms_per_token)
        if max(lengths, default=0) > fits:
            with pytest.raises(PlanError, match=rf"a piece of {max(lengths)} tokens .* at most {fits};"):
                plan_step(lengths, num_ranks=num_ranks, cost=cost, pp=pp, effort=0.2)
            refused += 1
            continue
        plan = plan_step(lengths, num_ranks=num_ranks, cost=cost, pp=pp, effort=0.2)
        validate_plan(plan, lengths, cost, pp=pp)
        assert all(sum(g.degree for g in groups) == num_ranks for groups in plan.microbatches), seed
        assert plan.time_ms >= plan.lower_bound_ms * (1 - 1e-12), seed
    assert refused > len(seeds) // 100


def test_random_steps_get_valid_plans_or_name_the_piece_that_cannot_fit():
    check_random_steps(range(500))


@pytest.mark.slow
def test_ten_thousand_random_steps_get_valid_plans():
    check_random_steps(range(500, 10_500))


def test_degrees_that_cannot_divide_the_ranks_are_refused():
    with pytest.raises(PlanError, match="add degree 1"):
        plan_step([10], num_ranks=3, cost=make_cost(3, smallest=2))
    odd = SequenceCost(
        alpha1_ms=0.0, alpha2_ms=1.0, beta_ms=0.0, comm_ms_per_token={1: 0.0, 3: 0.0}, capacity_tokens=10
    )
    with pytest.raises(PlanError, match=r"\[3\].*powers of two"):
        plan_step([10], num_ranks=3, cost=odd)


GOOD = ((Group(2, 0, (0,)), Group(1, 2, (1,)), Group(1, 3, ())),)


@pytest.mark.parametrize(
    "groups, message",
    [
        ((Group(2, 0, (0, 1)),), "piece|rank"),
        ((Group(1, 0, (1,)), Group(2, 2, (0,))), "descending"),
        ((Group(2, 0, (0,)), Group(2, 1, (1,))), "starts at rank 1"),
        ((Group(2, 0, (0,)), Group(1, 2, ()), Group(1, 3, ())), "1 pieces are placed"),
        ((Group(2, 0, (0, 0)), Group(1, 2, (1,)), Group(1, 3, ())), "3 pieces are placed"),
        ((Group(1, 0, (0,)), Group(1, 1, (1,)), Group(1, 2, ()), Group(1, 3, ())), "rank 0 holds 1500"),
        ((Group(8, 0, (0, 1)),), "degree 8 is not allowed"),
    ],
)
def test_validate_names_the_broken_rule(groups, message):
    cost, lengths = make_cost(4), [1500, 600]
    validate_plan(StepPlan(microbatches=GOOD, time_ms=1.0, lower_bound_ms=0.0), lengths, cost)
    plan = StepPlan(microbatches=(groups,), time_ms=1.0, lower_bound_ms=0.0)
    if groups == (Group(2, 0, (0, 1)),):
        lengths = [1500, 700]
    with pytest.raises(PlanError, match=message):
        validate_plan(plan, lengths, cost)


def test_memory_counts_over_consecutive_microbatches_of_a_pipeline():
    cost = make_cost(1)
    plan = StepPlan(
        microbatches=((Group(1, 0, (0,)),), (Group(1, 0, (1,)),)), time_ms=1.0, lower_bound_ms=0.0
    )
    validate_plan(plan, [600, 600], cost, pp=1)
    with pytest.raises(PlanError, match="holds 1200"):
        validate_plan(plan, [600, 600], cost, pp=2)


def test_published_batches_beat_the_official_solver():
    """Generator, checksums and FlexSP's official times in ms, 7B, 64 GPUs, 384K."""
    import numpy as np

    bandwidth = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
    cost = SequenceCost(
        alpha1_ms=5.128e-6,
        alpha2_ms=0.18396,
        beta_ms=629.36,
        comm_ms_per_token={d: 16 * 32 * 4096 / (2**20 * d * v) for d, v in bandwidth.items()},
        capacity_tokens=6407,
    )
    for median, sigma, tokens, official in ((700, 1.6, 1215488, 9467), (1200, 1.7, 2393984, 25082)):
        generator, lengths = np.random.default_rng(0), []
        while len(lengths) < 512:
            drawn = np.floor(generator.lognormal(np.log(median), sigma, 512)).astype(int) + 1
            lengths += [int(n) for n in -(-drawn // 128) * 128 if n <= 384000 - 128]
        lengths = lengths[:512]
        assert sum(lengths) == tokens
        plan = plan_step(lengths, num_ranks=64, cost=cost)
        validate_plan(plan, lengths, cost)
        assert plan.time_ms < official
        assert plan.lower_bound_ms == pytest.approx(lower_bound(lengths, num_ranks=64, cost=cost))


@pytest.mark.parametrize(
    "degree, heads, node, expected",
    [(8, 32, 8, (1, 8)), (16, 32, 8, (2, 8)), (8, 12, 8, (2, 4)), (4, 5, 8, (4, 1)), (1, 8, 8, (1, 1))],
)
def test_a_degree_splits_into_ring_across_and_heads_inside_the_node(degree, heads, node, expected):
    assert split_degree(degree, num_heads=heads, num_kv_heads=heads, node_ranks=node) == expected
