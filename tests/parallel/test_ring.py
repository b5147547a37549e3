"""The ring itself: schedule, overlap, memory, determinism, and peers that never answer."""

import time
import weakref
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from parallel.attention import Mask, make_attention
from parallel.attention import ring as ring_module
from parallel.attention.plan import Shares
from parallel.attention.ring_plan import ring_plan
from parallel.config import ParallelConfig
from parallel.errors import PeerLost
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh


def layout_for(mesh, ring, ulysses, offsets, kind="balanced"):
    groups = mesh.sequence(ring, ulysses)
    return SequenceLayout.build(
        offsets,
        ring=ring,
        ulysses=ulysses,
        ring_rank=groups.ring_rank,
        ulysses_rank=groups.ulysses_rank,
        kind=kind,
    )


def tensors(layout, heads, kv_heads, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(layout.ring_rank * 100 + layout.ulysses_rank)
    shapes = [(layout.token_index.numel(), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("inner", [1, 2, 3, 6])
def test_every_rank_meets_every_origin_once_and_gradients_come_home(inner):
    layout = SequenceLayout.build([0, 96], ring=6, ulysses=1, ring_rank=0, ulysses_rank=0)
    plans = [ring_plan(Shares.of(layout, Mask(), None), rank, 6, inner) for rank in range(6)]
    gradient_at = list(range(6))  # origin -> rank that holds its travelling gradients
    for step in range(6):
        for origin, holder in enumerate(gradient_at):
            hop = plans[holder].hops[step]
            assert plans[hop.send_to].hops[step].receive_from == holder
            assert hop.send == plans[hop.send_to].hops[step].receive == 16
            gradient_at[origin] = hop.send_to
        if step < 5:
            assert sorted(gradient_at) == list(range(6))
    assert gradient_at == list(range(6))
    for plan in plans:
        assert sorted(t.target for started in plan.transfers for t in started) == [1, 2, 3, 4, 5]


def test_the_slow_link_of_a_double_ring_has_a_whole_round():
    layout = SequenceLayout.build([0, 96], ring=6, ulysses=1, ring_rank=0, ulysses_rank=0)
    plan = ring_plan(Shares.of(layout, Mask(), None), 0, 6, 3)
    started = [[(t.target, t.send_to, t.receive_from) for t in transfers] for transfers in plan.transfers]
    assert started == [[(3, 3, 3), (1, 1, 2)], [(2, 1, 2)], [], [(4, 1, 2)], [(5, 1, 2)], []]


def order_of_events(rank, size):
    mesh = build_mesh(ParallelConfig(ring=size), "cpu")
    layout = layout_for(mesh, size, 1, [0, 64])
    attend, events = make_attention("ring", mesh), []
    real_exchange = ring_module.exchange

    def exchange(*args, **kwargs):
        pending = real_exchange(*args, **kwargs)
        events.append(f"start {kwargs['kind']} {kwargs['step']}")
        wait = type(pending).wait

        class Watched:
            def wait(self):
                wait(pending)
                events.append(f"have {kwargs['kind']} {kwargs['step']}")

        return Watched()

    q, k, v = tensors(layout, 2, 2, 8)
    attend(q, k, v, layout=layout)
    kernel = next(iter(attend._kernels.values()))["causal"]

    def forward(*args, **kwargs):
        events.append("compute")
        return kernel.forward(*args, **kwargs)

    for kernels in attend._kernels.values():
        for form in kernels:
            kernels[form] = replace(kernels[form], forward=forward)
    ring_module.exchange = exchange
    try:
        attend(q, k, v, layout=layout)
    finally:
        ring_module.exchange = real_exchange
    return events


def test_the_next_block_travels_while_this_one_is_computed_with():
    for events in run_ranks(order_of_events, 4):
        assert events == [
            "start kv 1",
            "compute",
            "have kv 1",
            "start kv 2",
            "compute",
            "have kv 2",
            "start kv 3",
            "compute",
            "have kv 3",
            "compute",
        ]


class Peak(TorchDispatchMode):
    """Bytes of all storages alive at once, of those that operators return."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._known.discard(key)
        self.now -= size


def peak_memory(rank, size, rows):
    mesh = build_mesh(ParallelConfig(ring=size), "cpu")
    layout = layout_for(mesh, size, 1, [0, rows * size])
    attend = make_attention("ring", mesh)
    q, k, v = tensors(layout, 2, 2, 16)
    attend(q, k, v, layout=layout).sum().backward()
    q.grad = k.grad = v.grad = None
    with Peak() as peak:
        out = attend(q, k, v, layout=layout)
        out.sum().backward()
    return peak.peak / (rows * 2 * 16 * 4)


def test_memory_does_not_grow_with_ring_steps():
    peaks = {size: max(run_ranks(peak_memory, size, 128)) for size in (2, 4, 8)}
    assert peaks[8] == peaks[4] <= peaks[2] + 4, peaks  # units of one K block; R = 2 prefetches nothing


def twice(rank, size, strategy, ring, ulysses):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    layout = layout_for(mesh, ring, ulysses, [0, 90, 91, 200])
    results = []
    for attempt in range(2):
        q, k, v = tensors(layout, 6, 3, 16)
        attend = make_attention(strategy, mesh)
        if attempt == rank % 2:
            time.sleep(0.2)
        out, lse = attend(q, k, v, layout=layout, return_lse=True)
        out.square().sum().backward()
        results.append((out.detach(), lse, q.grad, k.grad, v.grad))
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    ("strategy", "ring", "ulysses"), [("ring", 4, 1), ("usp", 2, 2), ("allgather", 4, 1)]
)
def test_two_runs_are_bit_equal(strategy, ring, ulysses):
    assert run_ranks(twice, 4, strategy, ring, ulysses) == [[True] * 5] * 4


def silent(rank, size, strategy, ring, ulysses, when):
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), None)
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    layout = layout_for(mesh, ring, ulysses, [0, 64])
    attend = make_attention(strategy, mesh)
    q, k, v = tensors(layout, 2, 2, 8)
    out = attend(q, k, v, layout=layout)
    if rank == 1:
        time.sleep(2.5)
        return None
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        out.sum().backward() if when == "backward" else attend(q, k, v, layout=layout)
    return time.monotonic() - start < 2.0, str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "ring", "ulysses", "when"),
    [
        ("ring", 2, 1, "forward"),
        ("ring", 2, 1, "backward"),
        ("allgather", 2, 1, "forward"),
        ("ulysses", 1, 2, "forward"),
    ],
)
def test_a_peer_that_never_answers_is_named_within_the_timeout(strategy, ring, ulysses, when):
    axis = "ring" if ring > 1 else "ulysses"
    in_time, message = run_ranks(silent, 2, strategy, ring, ulysses, when)[0]
    assert in_time, message
    assert f"on axis '{axis}'" in message and "among ranks [0, 1]" in message
