"""Heads over ulysses ranks: pure division, uneven shares, and the streamed variant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from parallel.attention import Mask, make_attention
from parallel.attention.heads import head_blocks, split_heads
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_every_head_has_one_rank_and_its_key_heads(num_kv_heads, shared, data):
    num_heads = num_kv_heads * shared
    ulysses = data.draw(st.integers(1, num_heads))
    shares = split_heads(num_heads, num_kv_heads, ulysses)
    assert [h for share in shares for h in range(*share.q)] == list(range(num_heads))
    assert max(s.num_q for s in shares) - min(s.num_q for s in shares) <= 1
    for share in shares:
        assert sorted({h // shared for h in range(*share.q)}) == list(range(*share.kv))


@SETTINGS
@given(st.integers(1, 8), st.integers(1, 5), st.booleans(), st.data())
def test_head_blocks_share_key_heads_evenly(num_kv_heads, shared, shifting, data):
    num_heads = num_kv_heads * shared
    ulysses = data.draw(st.integers(1, num_heads))
    mask = Mask(group_shift=4) if shifting else Mask()
    for share in split_heads(num_heads, num_kv_heads, ulysses):
        blocks = head_blocks(share, num_heads, num_kv_heads, mask)
        if blocks is None:
            assert share.num_q % share.num_kv == 0
            continue
        assert [h for b in blocks for h in range(*b.q)] == list(range(share.num_q))
        for block in blocks:
            rows, keys = block.q[1] - block.q[0], block.kv[1] - block.kv[0]
            for i in range(rows):
                head = share.q[0] + block.q[0] + i
                assert head // shared == share.kv[0] + block.kv[0] + i // (rows // keys)
                assert block.shifted == (shifting and head >= num_heads // 2)


def test_twelve_heads_with_four_key_heads_on_three_ranks():
    shares = split_heads(12, 4, 3)
    assert [(s.q, s.kv) for s in shares] == [((0, 4), (0, 2)), ((4, 8), (1, 3)), ((8, 12), (2, 4))]
    blocks = head_blocks(shares[0], 12, 4, Mask())
    assert [(b.q, b.kv) for b in blocks] == [((0, 3), (0, 1)), ((3, 4), (1, 2))]


def test_degrees_that_cannot_serve_the_heads():
    with pytest.raises(
        ConfigError, match=r"parallel.ulysses=48 exceeds num_heads=32; choose at most 32, or add"
    ):
        split_heads(32, 8, 48)
    with pytest.raises(
        ConfigError, match=r"num_kv_heads=3 must divide num_heads=8; choose one of \[1, 2, 4, 8\]"
    ):
        split_heads(8, 3, 2)


def streamed(rank, size, ring, ulysses, heads, dtype):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    groups = mesh.sequence(ring, ulysses)
    layout = SequenceLayout.build(
        [0, 31, 32, 45],
        ring=ring,
        ulysses=ulysses,
        ring_rank=groups.ring_rank,
        ulysses_rank=groups.ulysses_rank,
    )
    torch.manual_seed(1)
    x = torch.randn(45, 24, dtype=dtype)[layout.token_index]
    projections = [torch.randn(24, n * 8, dtype=dtype) for n in (heads[0], heads[1], heads[1])]
    attend = make_attention("usp", mesh)
    results, calls = [], []
    for stream in (False, True):
        weights = [p.clone().requires_grad_() for p in projections]
        local = x.clone().requires_grad_()
        mesh.counter.reset()
        if stream:
            under_way = attend.stream(layout=layout, num_heads=heads[0], num_kv_heads=heads[1])
            for name, weight in zip("qkv", weights, strict=True):
                under_way.send(name, (local @ weight).unflatten(1, (-1, 8)))
            out, lse = under_way.attend(return_lse=True)
        else:
            q, k, v = ((local @ weight).unflatten(1, (-1, 8)) for weight in weights)
            out, lse = attend(q, k, v, layout=layout, return_lse=True)
        out.square().sum().backward()
        results.append([out.detach(), lse, local.grad, *(w.grad for w in weights)])
        calls.append((sum(mesh.counter.calls.values()), sum(mesh.counter.sent_bytes.values())))
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)], calls


@pytest.mark.parametrize(
    ("size", "ring", "ulysses", "heads"),
    [(1, 1, 1, (4, 2)), (2, 1, 2, (6, 3)), (3, 1, 3, (12, 4)), (4, 2, 2, (4, 1)), (4, 1, 4, (6, 2))],
)
def test_streaming_changes_nothing_but_the_number_of_calls(size, ring, ulysses, heads):
    for equal, (plain, stream) in run_ranks(streamed, size, ring, ulysses, heads, torch.float64):
        assert all(equal)
        assert stream[1] == plain[1]
        assert stream[0] == plain[0] + (4 if ulysses > 1 else 0)


def overlap(rank, size):
    """Names of what happens, in order: exchanges of a stream against the projections around them."""
    mesh = build_mesh(ParallelConfig(ulysses=size), "cpu")
    layout = SequenceLayout.build([0, 16], ring=1, ulysses=size, ring_rank=0, ulysses_rank=rank)
    attend, events = make_attention("ulysses", mesh), []
    add = mesh.counter.add

    class Project(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            events.append(f"project {name}")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            events.append(f"unproject {ctx.name}")
            return grad, None

    type(mesh.counter).add = lambda self, kind, sent: (events.append(kind), add(kind, sent))[1]
    x = torch.randn(8, 4, 8, requires_grad=True)
    stream = attend.stream(layout=layout, num_heads=4, num_kv_heads=4)
    for name in "qkv":
        stream.send(name, Project.apply(x, name))
    stream.attend().sum().backward()
    return events


def test_exchanges_start_before_the_next_projection_and_gradients_before_its_backward():
    for events in run_ranks(overlap, 2):
        assert events[:6] == ["project q", "ulysses_q", "project k", "ulysses_k", "project v", "ulysses_v"]
        assert events[6:8] == ["ulysses_out", "ulysses_out"]
        assert sorted(events[8:11]) == ["ulysses_k", "ulysses_q", "ulysses_v"]
        assert events[11:] == ["unproject v", "unproject k", "unproject q"]


def misused(rank, size):
    mesh = build_mesh(ParallelConfig(), "cpu")
    layout = SequenceLayout.build([0, 4], ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    stream = make_attention("local", mesh).stream(layout=layout, num_heads=4, num_kv_heads=2)
    stream.send("q", torch.zeros(4, 4, 8))
    messages = []
    for call in (
        lambda: stream.send("q", torch.zeros(4, 4, 8)),
        lambda: stream.send("k", torch.zeros(4, 4, 8)),
        lambda: stream.send("k", torch.zeros(3, 2, 8)),
        lambda: stream.attend(),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_a_misused_stream_says_what_it_waits_for():
    (messages,) = run_ranks(misused, 1)
    assert messages[0] == "cannot send 'q'; this stream still waits for ['k', 'v']"
    assert messages[1] == "k has 4 heads, but the stream was opened for 2"
    assert messages[2].startswith("k has 3 tokens, but layout.token_index has 4")
    assert messages[3] == "cannot attend yet; send ['k', 'v'] first"
