"""On a CUDA device: every kernel that can run there against float64, and all strategies on 4 ranks."""

import kernel_cases
import pytest
import sequence_cases
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sequence_cases import Case, cases

from parallel.attention.backends import KERNELS, Needs, refusal
from parallel.attention.mask import Mask
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
ONCE = settings(
    max_examples=2, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)
BF16 = (1e-2, 1e-3, 2e-2, 2e-2, 2e-2)
"""Largest errors of out, lse, dq, dk and dv: inputs, products and results are rounded to 8 bits."""
LENGTHS = (300, 1, 77, 0, 130, 515)


def or_skip(kernel, **needs):
    reason = refusal(kernel, Needs(device="cuda", **needs))
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if "cuda" in k.devices], ids=lambda k: k.name)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"causal": False}, {"window": 33}, {"anchor": True, "window": 9}], ids=str
)
def test_a_kernel_equals_float64(kernel, head_dim, heads, fields):
    mask = Mask(**fields)
    for form in mask.forms:
        needs = {"form": form, "dtype": torch.bfloat16, "head_dim": head_dim}
        or_skip(kernel, grouped=heads[0] != heads[1], **needs)
    case = {"heads": heads, "head_dim": head_dim, "lengths": LENGTHS}
    found = kernel_cases.errors(kernel, mask, where=(torch.bfloat16, "cuda"), **case)
    assert all(a <= b for a, b in zip(found, BF16, strict=True)), found


def check(rank, size, drawn, dtype, tolerance):
    torch.cuda.set_device(0)
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cuda")
    found = [(case, sequence_cases.errors(case, mesh, dtype)) for case in drawn]
    return [(case, errors) for case, errors in found if max(errors) > tolerance]


def equal(drawn, dtype, tolerance):
    for rank, wrong in enumerate(run_ranks(check, 4, drawn, dtype, tolerance, timeout=300)):
        assert not wrong, f"rank {rank}: {wrong[0]}"


def test_any_case_on_four_ranks_of_one_device_in_float64():
    @ONCE
    @given(st.lists(cases(4), min_size=24, max_size=24))
    def run(drawn):
        equal(drawn, torch.float64, 1e-10)

    run()


@pytest.mark.parametrize("strategy", ["usp", "allgather"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 4e-2)], ids=str)
def test_every_mask_on_four_ranks_of_one_device(strategy, dtype, tolerance):
    shared = {"strategy": strategy, "ring": 2, "ulysses": 2, "heads": (6, 2), "head_dim": 64}
    drawn = [
        Case(lengths=(1, 30, 0, 17, 3), kind="balanced", mask=mask, **shared) for mask in sequence_cases.MASKS
    ]
    equal(drawn, dtype, tolerance)
