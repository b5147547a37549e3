"""Planned steps on one rank: plans are made ahead in a thread, and a piece counts what it costs."""

import threading

import numpy as np
import pytest
from stores import make_store

from longctx.data.packing import Piece, Pieces, StepPacks, work
from longctx.data.planned import PlannedLoader, Planning
from parallel.planner.sequence import SequenceCost, plan_step, validate_plan

COST = SequenceCost(
    alpha1_ms=1e-3,
    alpha2_ms=1.0,
    beta_ms=1.0,
    comm_ms_per_token={1: 0.0, 2: 0.1, 4: 0.1},
    capacity_tokens=20,
)


class OnePiece:
    """Step n has one piece of n + 1 tokens."""

    def packs(self, step):
        return [(Piece(0, 0, step + 1),)]

    def exhausted(self, step):
        return []


def planning(plan, *, num_ranks: int = 1) -> Planning:
    def check(found, lengths):
        validate_plan(found, lengths, COST)

    return Planning(data_rank=0, plan=plan, check=check, share=lambda message: message, leader=True)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", [[*range(40), 256]])


def test_the_plan_of_the_next_step_is_there_and_the_one_after_is_made_in_a_thread(store):
    planned, started, allowed = [], threading.Event(), threading.Event()

    def plan(lengths):
        planned.append((lengths[0] - 1, threading.current_thread().name.split("_")[0]))
        if lengths == [3]:  # step 2
            started.set()
            allowed.wait(30)
        return plan_step(lengths, num_ranks=1, cost=COST)

    loader = PlannedLoader(store, OnePiece(), planning(plan))
    try:
        assert loader.step(0)[0].num_tokens == 1  # returns although step 2 cannot be planned yet
        assert started.wait(30)
        main = threading.current_thread().name.split("_")[0]
        assert planned == [(0, main), (1, main), (2, "longctx-planner")]
        allowed.set()
        assert [loader.step(step)[0].num_tokens for step in (1, 2, 3)] == [2, 3, 4]
        assert {name for step, name in planned if step >= 2} == {"longctx-planner"}
        assert [step for step, _ in planned][:5] == [0, 1, 2, 3, 4]  # each step once
    finally:
        allowed.set()
        loader.close()


def columns(costs) -> Pieces:
    n = len(costs)
    return Pieces(
        doc=np.zeros(n, dtype=np.int64),
        start=np.arange(n, dtype=np.int64) * 4,
        length=np.full(n, 4, dtype=np.int64),
        cost=None if costs is None else np.array(costs, dtype=np.int64),
    )


def test_a_piece_counts_its_cost_in_plans_and_in_the_balance_of_groups(store):
    packs = StepPacks(columns([4, 4, 40, 4]), seed=0, microbatch_tokens=16, packs_per_step=1)
    loader = PlannedLoader(store, packs, planning(lambda n: plan_step(n, num_ranks=4, cost=COST)))
    try:
        assert sorted(loader.lengths(0)) == [4, 4, 4, 40]
        loader.step(0)
        (expensive,) = [i for i, weight in enumerate(loader.lengths(0)) if weight == 40]
        assert loader.plan is not None
        groups = [group for groups in loader.plan.microbatches for group in groups]
        # 40 tokens of text do not fit 20 on a rank; its own 4 would.
        assert next(group.degree for group in groups if expensive in group.pieces) >= 2
    finally:
        loader.close()
    cheap, dear = Piece(0, 0, 4), Piece(0, 4, 4, 40)
    assert (cheap.weight, dear.weight) == (4, 40)
    assert work((dear,)) == 100 * work((cheap,))
