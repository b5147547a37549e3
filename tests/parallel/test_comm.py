"""Collectives with uneven sizes, counting, and errors that name the peer."""

import pickle

import pytest
import torch
from ranks import run_ranks

from parallel import comm
from parallel.config import ParallelConfig
from parallel.errors import PeerLost
from parallel.mesh import build_mesh

COUNTS = [3, 0, 5, 1]


def uneven(rank, size):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    group = mesh.group("data")
    mine = torch.full((COUNTS[rank], 2), float(rank), dtype=torch.float64)
    gathered = comm.gather_rows(mine, COUNTS, group)
    whole = torch.arange(18, dtype=torch.float64).view(9, 2) * (rank + 1)
    scattered = comm.reduce_scatter_rows(whole, COUNTS, group)
    flat = torch.arange(float(sum(COUNTS))) + 100 * rank
    received, pending = comm.all_to_all(flat, COUNTS, [COUNTS[rank]] * size, group, kind="test")
    pending.wait()
    everyone = comm.gather_json({"rank": rank, "pair": (rank, "x" * rank)}, group=group)
    source = comm.broadcast(torch.tensor([float(rank)]), src=2, group=group)
    largest = comm.all_reduce(torch.tensor([float(rank)]), group, op="max")
    comm.barrier(group)
    return (
        gathered,
        scattered,
        received,
        everyone,
        source.item(),
        largest.item(),
        dict(mesh.counter.sent_bytes),
    )


def test_uneven_rows_and_values_reach_every_rank():
    found = run_ranks(uneven, 4)
    rows = torch.repeat_interleave(torch.arange(4.0, dtype=torch.float64), torch.tensor(COUNTS))
    whole = torch.arange(18, dtype=torch.float64).view(9, 2) * 10
    for rank, (gathered, scattered, received, everyone, source, largest, sent) in enumerate(found):
        start = sum(COUNTS[:rank])
        mine = slice(start, start + COUNTS[rank])
        assert torch.equal(gathered, rows[:, None].expand(9, 2))
        assert torch.equal(scattered, whole[mine])
        expected = [torch.arange(9.0)[mine] + 100 * r for r in range(4)]
        assert torch.equal(received, torch.cat(expected))
        assert everyone == [{"rank": r, "pair": [r, "x" * r]} for r in range(4)]
        assert (source, largest) == (2.0, 3.0)
        assert sent["test"] == 4 * (sum(COUNTS) - COUNTS[rank])
        assert sent["reduce_scatter_rows"] == 16 * (sum(COUNTS) - COUNTS[rank])


def one_rank(rank, size):
    mesh = build_mesh(ParallelConfig(), "cpu")
    group = mesh.group("world")
    x = torch.arange(4.0)
    assert torch.equal(comm.gather_rows(x, [4], group), x)
    assert torch.equal(comm.reduce_scatter_rows(x, [4], group), x)
    assert torch.equal(comm.all_to_all(x, [4], [4], group, kind="test")[0], x)
    assert comm.gather_json([1, (2,)], group=group) == [[1, [2]]]
    return dict(mesh.counter.calls)


def test_one_rank_communicates_nothing():
    assert run_ranks(one_rank, 1) == [{}]


def gone(rank, size):
    mesh = build_mesh(ParallelConfig(ring=size), "cpu")
    group = mesh.sequence(2, 1).ring_group
    if rank == 1:
        return mesh.close()
    with pytest.raises(PeerLost) as caught:
        comm.exchange([], [(1, torch.zeros(2))], group, kind="kv", step=3).wait()
    return caught.value.axis, caught.value.rank, caught.value.step


def test_a_closed_connection_names_axis_rank_and_step():
    found = run_ranks(gone, 2)
    assert found[0] == ("ring", 1, 3)


def test_the_error_survives_a_process_boundary():
    error = PeerLost(axis="ulysses", rank=7, step=None, detail="silence")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.axis, copy.rank, copy.step, str(copy)) == ("ulysses", 7, None, str(error))
    assert str(error) == "lost rank 7 on axis 'ulysses': silence"
