"""Every strategy, split, head count, layout and mask equals the dense mask in one process."""

import pytest
import sequence_cases
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sequence_cases import Case, cases

from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

ONCE = settings(
    max_examples=3, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)


def check(rank, size, drawn, dtype, tolerance, options):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    wrong = []
    for case in drawn:
        found = sequence_cases.errors(case, mesh, dtype, **options)
        if max(found) > tolerance:
            wrong.append((case, found))
    return wrong


def equal(size, drawn, dtype=torch.float64, tolerance=1e-10, **options):
    for rank, wrong in enumerate(run_ranks(check, size, drawn, dtype, tolerance, options)):
        assert not wrong, f"rank {rank}: {wrong[0]}"


@pytest.mark.parametrize("size", range(1, 9))
def test_any_case_in_float64(size):
    @ONCE
    @given(st.lists(cases(size), min_size=64 // (size + 2), max_size=64 // (size + 2)))
    def run(drawn):
        equal(size, drawn)

    run()


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_in_float32(size):
    @ONCE
    @given(st.lists(cases(size), min_size=12, max_size=12))
    def run(drawn):
        equal(size, drawn, torch.float32, 1e-5)

    run()


@pytest.mark.parametrize("size", [1, 4])
def test_plain_torch_kernel(size):
    @ONCE
    @given(st.lists(cases(size), min_size=12, max_size=12))
    def run(drawn):
        equal(size, drawn, kernel="torch")

    run()


@pytest.mark.parametrize("strategy", ["usp", "allgather"])
def test_every_mask_over_ring_and_ulysses(strategy):
    shared = {"strategy": strategy, "ring": 2, "ulysses": 2, "heads": (6, 2), "head_dim": 4}
    drawn = [
        Case(lengths=(1, 30, 0, 17, 3), kind=kind, mask=mask, **shared)
        for kind in ("balanced", "zigzag", "contiguous")
        for mask in sequence_cases.MASKS
    ]
    equal(4, drawn)


def test_twelve_heads_four_key_heads_on_three_ranks():
    case = Case(
        strategy="ulysses",
        ring=1,
        ulysses=3,
        heads=(12, 4),
        head_dim=8,
        lengths=(19, 4, 1),
        kind="balanced",
        mask={},
    )
    equal(3, [case])


def test_tiles_larger_than_a_kernel_block():
    shared = {"heads": (2, 1), "head_dim": 8, "lengths": (700, 150), "kind": "balanced"}
    drawn = [
        Case(strategy=strategy, ring=2, ulysses=1, mask=mask, **shared)
        for strategy in ("ring", "allgather")
        for mask in ({}, {"window": 300}, {"window": 100, "sinks": 4}, {"min_distance": 290})
    ]
    equal(2, drawn)


def test_bfloat16_stays_within_its_rounding():
    shared = {"heads": (4, 2), "head_dim": 16, "lengths": (200, 57), "kind": "balanced", "mask": {}}
    drawn = [Case(strategy="usp", ring=ring, ulysses=4 // ring, **shared) for ring in (1, 2, 4)]
    equal(4, drawn, torch.bfloat16, 2e-2)
    equal(4, drawn, torch.bfloat16, 2e-2, wire_dtype=torch.bfloat16)
