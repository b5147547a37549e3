"""One process: kernels against the dense mask, against each other, and at their edges."""

import dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.attention.backends import KERNELS, Needs, refusal
from parallel.attention.engine import Call, run
from parallel.attention.local import local_route
from parallel.attention.mask import Mask
from parallel.attention.merge import merge_
from parallel.attention.plan import Shares
from parallel.layout import SequenceLayout

CPU_KERNELS = [
    kernel
    for kernel in KERNELS
    if refusal(kernel, Needs(form="full", device="cpu", dtype=torch.float64, head_dim=8)) is None
]


def attend(kernel, tensors, offsets, mask=Mask(), **options):  # noqa: B008 -- frozen
    layout = SequenceLayout.build(offsets, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    route = local_route(Shares.of(layout, mask, None))
    kernels = dict.fromkeys(("full", "causal", "band"), kernel)
    return run(*tensors, Call(route=route, kernels=kernels, scale=tensors[0].shape[2] ** -0.5, **options))


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_kernels_equal_the_definition(kernel, head_dim, heads):
    offsets, mask = [0, 1, 300, 330], Mask()
    q, k, v, dout = dense.inputs(330, *heads, head_dim, torch.float64)
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    reference = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, largest = attend(kernel, local, offsets, max_logit=True)
    expected, expected_lse, expected_largest = dense.attention(
        *reference, dense.visible(offsets, mask, heads[0]), head_dim**-0.5
    )
    out.backward(dout)
    expected.backward(dout)
    pairs = [(out, expected), (lse, expected_lse), (largest, expected_largest)]
    pairs += [(a.grad, b.grad) for a, b in zip(local, reference, strict=True)]
    assert max(dense.error(a.detach(), b.detach()) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("rows", [128, 129, 1024, 1025, 2048, 2049])
def test_causal_squares_around_the_sizes_at_which_they_are_cut(rows):
    tensors = dense.inputs(rows, 2, 1, 4, torch.float64)
    found = []
    for kernel in CPU_KERNELS:
        local = [x.clone().requires_grad_() for x in tensors[:3]]
        out, lse, _ = attend(kernel, local, [0, rows])
        out.backward(tensors[3])
        found.append([out.detach(), lse, *(x.grad for x in local)])
    assert len(found) > 1
    assert all(dense.error(a, b) < 1e-12 for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lse_is_at_least_float32_and_carries_no_gradient(kernel, dtype):
    tensors = [x.requires_grad_() for x in dense.inputs(20, 2, 1, 8, dtype)[:3]]
    out, lse, largest = attend(kernel, tensors, [0, 20], max_logit=True)
    assert (out.dtype, lse.dtype, largest.dtype) == (dtype, torch.float32, torch.float32)
    assert out.requires_grad and not lse.requires_grad and not largest.requires_grad


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_rows_reach_no_kernel(kernel, offsets):
    tensors = [torch.zeros(0, n, 8, requires_grad=True) for n in (4, 2, 2)]
    out, lse, largest = attend(kernel, tensors, offsets, max_logit=True)
    out.sum().backward()
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    assert largest.tolist() == [-torch.inf] * 4
    assert [x.grad.shape[0] for x in tensors] == [0, 0, 0]


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
def test_a_query_that_sees_no_key_gets_zero_and_minus_infinity(kernel):
    tensors = [x.requires_grad_() for x in dense.inputs(9, 2, 2, 8, torch.float64)[:3]]
    out, lse, largest = attend(kernel, tensors, [0, 6, 9], Mask(min_distance=4), max_logit=True)
    blind = [0, 1, 2, 3, 6, 7, 8]
    assert not out[blind].any() and lse[:, blind].eq(-torch.inf).all()
    assert lse[:, [4, 5]].isfinite().all() and largest.isfinite().all()
    out.sum().backward()
    assert not tensors[0].grad[blind].any() and not tensors[0].grad.isnan().any()


def test_a_second_derivative_is_refused_not_wrong():
    tensors = [x.requires_grad_() for x in dense.inputs(5, 2, 2, 4, torch.float64)[:3]]
    out, _, _ = attend(KERNELS[-1], tensors, [0, 5])
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_merging_parts_is_attending_to_all(sizes, seed):
    """Any partition of the keys, empty parts and rows without keys included, up to large logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64) * 300
    values = torch.randn(2, sum(sizes), 4, generator=generator, dtype=torch.float64)
    out = torch.zeros(3, 2, 4, dtype=torch.float64)
    lse = torch.full((2, 3), -torch.inf, dtype=torch.float64)
    start = 0
    for size in sizes:
        part, own = logits[..., start : start + size], values[:, start : start + size]
        part_lse = part.logsumexp(-1) if size else torch.full((2, 3), -torch.inf, dtype=torch.float64)
        merge_(out, lse, (part.softmax(-1) @ own).transpose(0, 1), part_lse)
        start += size
    if start:
        assert dense.error(out, (logits.softmax(-1) @ values).transpose(0, 1)) < 1e-12
        assert dense.error(lse, logits.logsumexp(-1)) < 1e-12
    else:
        assert not out.any() and lse.eq(-torch.inf).all()
