"""The certificate: below every plan, above the simple bound, close where every piece is placed by itself."""

import random
from itertools import product

import pytest

from parallel.planner.certificate import certified_bound
from parallel.planner.sequence import SequenceCost, lower_bound, plan_step

COST = SequenceCost(
    alpha1_ms=1e-5,
    alpha2_ms=1e-2,
    beta_ms=3.0,
    comm_ms_per_token={1: 0.0, 2: 1e-3, 4: 4e-3},
    capacity_tokens=1000,
)


def best_of_all(lengths: list[int], num_ranks: int, cost: SequenceCost, microbatches: int) -> float:
    """The best time over every plan with at most so many microbatches, by trying all."""
    partitions = {2: [(2,), (1, 1)], 4: [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]}[num_ranks]
    best = float("inf")
    for shape in product(partitions, repeat=microbatches):
        slots = [(m, i) for m, groups in enumerate(shape) for i in range(len(groups))]
        for where in product(slots, repeat=len(lengths)):
            times = [[0.0] * len(groups) for groups in shape]
            tokens = [[0] * len(groups) for groups in shape]
            for length, (m, i) in zip(lengths, where, strict=True):
                times[m][i] += cost.piece_ms(length, shape[m][i])
                tokens[m][i] += length
            fits = all(
                tokens[m][i] <= cost.capacity_tokens * shape[m][i] for m, i in slots
            )  # fmt: skip
            if fits:
                used = [max(row) + cost.beta_ms for row in times if any(row)]
                best = min(best, sum(used))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_all_is_below_the_certificate(seed):
    chooser = random.Random(seed)
    lengths = [chooser.randint(50, 1500) for _ in range(4)]
    best = best_of_all(lengths, 4 if seed % 2 else 2, COST, 2)
    ranks = 4 if seed % 2 else 2
    bound = certified_bound(lengths, num_ranks=ranks, cost=COST, limit_ms=best)
    assert lower_bound(lengths, num_ranks=ranks, cost=COST) <= bound <= best * (1 + 1e-9)
    plan = plan_step(lengths, num_ranks=ranks, cost=COST)
    assert best * (1 - 1e-9) <= plan.time_ms


@pytest.mark.parametrize("seed", range(4))
def test_plans_of_small_batches_are_certified(seed):
    chooser = random.Random(seed)
    lengths = [min(3900, int(chooser.lognormvariate(5.5, 1.3)) + 1) for _ in range(30)]
    plan = plan_step(lengths, num_ranks=4, cost=COST)
    bound = certified_bound(lengths, num_ranks=4, cost=COST, limit_ms=plan.time_ms, whole=30, seconds=4.0)
    assert plan.lower_bound_ms <= bound * (1 + 1e-12)
    assert 1.0 <= plan.time_ms / bound * (1 + 1e-9) < 1.12
