"""`traffic` (pure) equals what is counted, and the reference formulas where shares are even."""

import pytest
import sequence_cases
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sequence_cases import Case, cases

from parallel.attention import Mask, make_attention, traffic
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh

ONCE = settings(
    max_examples=2, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)


def predicted(case, layout, itemsize=4, **options):
    return traffic(
        layout,
        num_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        itemsize=itemsize,
        strategy=case.strategy,
        mask=Mask(**case.mask),
        **case.options,
        **options,
    )


def counted(rank, size, drawn, dtype, wire):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    wrong = []
    for case in drawn:
        layout = sequence_cases.layout_of(case, mesh)
        shapes = [(len(layout.token_index), n, case.head_dim) for n in (case.heads[0], *(case.heads[1],) * 2)]
        q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
        attend = make_attention(case.strategy, mesh, wire_dtype=wire, **case.options)
        counts = []
        mesh.counter.reset()
        out = attend(q, k, v, layout=layout, mask=Mask(**case.mask))
        counts.append((dict(mesh.counter.calls), dict(mesh.counter.sent_bytes)))
        mesh.counter.reset()
        out.sum().backward()
        counts.append((dict(mesh.counter.calls), dict(mesh.counter.sent_bytes)))
        itemsize, wire_itemsize = dtype.itemsize, None if wire is None else wire.itemsize
        plan = predicted(case, layout, itemsize, wire_itemsize=wire_itemsize)
        expected = [(plan.forward_calls, plan.forward_sent), (plan.backward_calls, plan.backward_sent)]
        if counts != [(some(calls), {k: sent[k] for k in some(calls)}) for calls, sent in expected]:
            wrong.append((case, counts, expected))
    return wrong


def some(calls):
    return {kind: number for kind, number in calls.items() if number}


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_counted_calls_and_bytes_are_the_predicted_ones(size):
    @ONCE
    @given(st.lists(cases(size), min_size=16, max_size=16))
    def run(drawn):
        for wrong in run_ranks(counted, size, drawn, torch.float32, None):
            assert not wrong, wrong[0]

    run()


def test_gradients_travel_in_the_wire_dtype():
    case = Case("usp", 4, 1, (4, 2), 8, (100, 3), "balanced", {})
    for wire, dtype in ((torch.bfloat16, torch.bfloat16), (None, torch.bfloat16), (None, torch.float64)):
        for wrong in run_ranks(counted, 4, [case], dtype, wire):
            assert not wrong, wrong[0]


def formula(case, tokens, rho):
    """Elements sent per rank, forward and backward: reference table for even shares."""
    strategy, ring, ulysses = case.strategy, case.ring, case.ulysses
    heads, head_dim = case.heads, case.head_dim
    d, n = heads[0] * head_dim, tokens // (ring * ulysses)
    k = (heads[1] if ulysses == 1 else max(heads[1], ulysses)) * head_dim
    exchange = (ulysses - 1) * n * (2 * d + 2 * k) // ulysses
    hops = (ring - 1) * n * 2 * k
    if strategy == "allgather":
        return exchange + hops, exchange + hops + (ring - 1) * n * 2 * k * rho
    return exchange + hops, exchange + hops + (ring * n * 2 * k * rho if ring > 1 else 0)


EVEN = [
    (strategy, ring, ulysses, heads)
    for strategy, splits in {
        "ulysses": [(1, 2), (1, 8)],
        "ring": [(2, 1), (4, 1), (8, 1)],
        "usp": [(2, 4), (4, 2), (1, 8), (8, 1)],
        "allgather": [(2, 1), (8, 1), (4, 2)],
    }.items()
    for ring, ulysses in splits
    for heads in ((8, 8), (16, 2), (8, 4))
]


@pytest.mark.parametrize(("strategy", "ring", "ulysses", "heads"), EVEN)
@pytest.mark.parametrize("kind", ["balanced", "zigzag"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_even_shares_send_what_the_formulas_say(strategy, ring, ulysses, heads, kind, itemsize):
    tokens, head_dim = 16 * ring * ulysses, 64
    case = Case(strategy, ring, ulysses, heads, head_dim, (tokens,), kind, {})
    expected = formula(case, tokens, 4 // itemsize)
    for rank in range(ring * ulysses):
        layout = SequenceLayout.build(
            [0, tokens],
            ring=ring,
            ulysses=ulysses,
            ring_rank=rank // ulysses,
            ulysses_rank=rank % ulysses,
            kind=kind,
        )
        sent = predicted(case, layout, itemsize)
        assert (sent.forward_bytes, sent.backward_bytes) == tuple(itemsize * x for x in expected)


@pytest.mark.parametrize("inner", [1, 2, 4, 8])
def test_a_double_ring_sends_what_a_single_one_sends(inner):
    layout = SequenceLayout.build([0, 128], ring=8, ulysses=1, ring_rank=3, ulysses_rank=0)
    single = Case("ring", 8, 1, (4, 4), 8, (128,), "balanced", {})
    double = Case("ring", 8, 1, (4, 4), 8, (128,), "balanced", {}, {"inner_ring": inner})
    assert predicted(single, layout) == predicted(double, layout)
    assert predicted(single, layout).forward_calls["kv"] == 7
    assert (
        predicted(single, layout).backward_calls["kv"] + predicted(single, layout).backward_calls["dkv"] == 15
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.sampled_from([(1, 4), (2, 2), (4, 1), (3, 2)]),
    st.sampled_from(["balanced", "zigzag", "contiguous"]),
    st.sampled_from(["usp", "allgather"]),
)
def test_any_shares_send_at_most_what_the_formulas_say(lengths, split, kind, strategy):
    ring, ulysses = split
    heads, head_dim, total = (12, 12), 4, sum(lengths)
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = SequenceLayout.build(offsets, ring=ring, ulysses=ulysses, ring_rank=0, ulysses_rank=0, kind=kind)
    case = Case(strategy, ring, ulysses, heads, head_dim, tuple(lengths), kind, {})
    sent = [predicted(case, layout.at(r, u)) for r in range(ring) for u in range(ulysses)]
    ranks = ring * ulysses
    forward, backward = formula(case, total * ranks, 1)
    assert sum(t.forward_bytes for t in sent) <= 4 * forward
    assert sum(t.backward_bytes for t in sent) <= 4 * backward


@pytest.mark.parametrize("strategy", ["usp", "allgather"])
def test_documents_that_fit_on_one_rank_send_no_ring_bytes(strategy):
    case = Case(strategy, 4, 2, (4, 2), 8, (8,) * 16, "balanced", {})
    for rank in range(4):
        offsets = list(range(0, 8 * 17, 8))
        layout = SequenceLayout.build(offsets, ring=4, ulysses=2, ring_rank=rank, ulysses_rank=0)
        sent = predicted(case, layout)
        assert sent.forward_sent["kv"] == sent.backward_sent["kv"] == sent.backward_sent["dkv"] == 0
        assert sent.forward_calls["kv"] == sent.backward_calls["kv"] == sent.backward_calls["dkv"] == 0


def test_a_window_sends_only_the_rows_it_reaches():
    case = Case("ring", 4, 1, (2, 2), 8, (400,), "contiguous", {"window": 11})
    layout = SequenceLayout.build([0, 400], ring=4, ulysses=1, ring_rank=1, ulysses_rank=0, kind="contiguous")
    assert predicted(case, layout).forward_sent["kv"] == 10 * 2 * 2 * 8 * 4
