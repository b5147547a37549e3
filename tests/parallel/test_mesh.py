"""The mesh: who is where on every axis, and which ranks share a sequence."""

import gc
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor

from parallel import comm
from parallel.config import ParallelConfig
from parallel.errors import ConfigError, PeerLost
from parallel.mesh import build_mesh, sequence_splits


def ranks_of(rank, size, degrees):
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")
    axes = {
        axis: mesh.group(axis).ranks
        for axis in ("pp", "ring", "ulysses", "tp", "cp", "fsdp", "data", "world")
    }
    assert all(mesh.coordinate(axis) == ranks.index(rank) for axis, ranks in axes.items())
    shape = tuple(mesh.fsdp_mesh.shape)
    index, groups = mesh.data_group_index, mesh.num_data_groups
    mesh.close()
    again = build_mesh(ParallelConfig(**degrees), "cpu")
    total = comm.all_reduce(torch.ones(1), again.group("world")).item()
    assert total == size
    return axes, shape, index, groups


def test_axes_are_ordered_outermost_first():
    found = run_ranks(ranks_of, 8, {"pp": 2, "ring": 2, "ulysses": 2})
    assert found[5][0] == {
        "pp": (1, 5),
        "ring": (5, 7),
        "ulysses": (4, 5),
        "tp": (5,),
        "cp": (4, 5, 6, 7),
        "fsdp": (4, 5, 6, 7),
        "data": (4, 5, 6, 7),
        "world": tuple(range(8)),
    }
    assert found[5][1:] == ((4,), 0, 1)


def test_replicas_make_a_two_dimensional_fsdp_mesh():
    found = run_ranks(ranks_of, 8, {"dp_replicate": 2, "dp_shard": 2, "ulysses": 2})
    assert [f[1] for f in found] == [(2, 4)] * 8
    assert [f[2] for f in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found[0][3] == 4


def splits_work(rank, size, degrees):
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")
    found = {}
    for ring, ulysses in sequence_splits(mesh.config, mesh.coordinate("data")):
        groups = mesh.sequence(ring, ulysses)
        sums = [
            comm.all_reduce(torch.tensor([float(rank)]), group).item()
            for group in (groups.ring_group, groups.ulysses_group, groups.group)
        ]
        members = (groups.ring_group.ranks, groups.ulysses_group.ranks, groups.group.ranks)
        assert sums == [sum(ranks) for ranks in members]
        found[ring, ulysses] = members
    return found


def test_every_split_of_the_data_ranks_is_built_when_none_is_configured():
    found = run_ranks(splits_work, 6, {"dp_shard": 6})
    assert set(found[0]) == {
        (r, u) for d in (1, 2, 3, 4, 6) for r in range(1, 7) for u in range(1, 7) if r * u == d
    }
    assert found[3][2, 2] == ((1, 3), (2, 3), (0, 1, 2, 3))
    assert found[5][3, 2] == ((1, 3, 5), (4, 5), (0, 1, 2, 3, 4, 5))
    assert (4, 1) not in found[5]  # ranks 4 and 5 fill no aligned block of four


def test_a_configured_split_is_the_only_one():
    found = run_ranks(splits_work, 8, {"dp_shard": 2, "ring": 2, "ulysses": 1, "tp": 2})
    assert set(found[0]) == {(1, 1), (2, 1)}
    assert found[7][2, 1] == ((5, 7), (7,), (5, 7))


def test_splits_without_processes():
    splits = sequence_splits(ParallelConfig(dp_shard=2, ring=4, ulysses=2), 13)
    assert {name: list(members) for name, members in splits[4, 2].items()} == {
        "ring": [9, 11, 13, 15],
        "ulysses": [12, 13],
        "cp": list(range(8, 16)),
    }


def refusals(rank, size):
    mesh = build_mesh(ParallelConfig(ring=2), "cpu")
    messages = []
    for call in (
        lambda: mesh.sequence(1, 2),
        lambda: mesh.group("rows"),
        lambda: build_mesh(ParallelConfig(ring=4), "cpu"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_errors_name_the_choices_on_every_rank():
    for messages in run_ranks(refusals, 2):
        assert "(ring, ulysses) in [(1, 1), (2, 1)]" in messages[0]
        assert "'rows' does not exist" in messages[1] and "'ulysses'" in messages[1]
        assert "need 4 processes, not 2" in messages[2]


def silent_peer(rank, size):
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), None)
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    group = mesh.sequence(2, 1).ring_group
    comm.all_reduce(torch.zeros(1), group)
    if rank == 1:
        time.sleep(4)
        return None
    seen = []
    for call in (
        lambda: comm.exchange([], [(1, torch.zeros(3))], group, kind="kv", step=2).wait(),
        lambda: comm.all_to_all(torch.zeros(4), [2, 2], [2, 2], group, kind="heads")[1].wait(),
        lambda: comm.all_reduce(torch.zeros(3), mesh.group("data")),
    ):
        start = time.monotonic()
        with pytest.raises(PeerLost) as caught:
            call()
        seen.append((time.monotonic() - start < 3.0, str(caught.value)))
    return seen


def test_groups_keep_the_timeout_of_the_default_group():
    seen, _ = run_ranks(silent_peer, 2)
    assert all(in_time for in_time, _ in seen)
    assert seen[0][1].startswith("lost rank 1 on axis 'ring', step 2: kv among ranks [0, 1]")
    assert seen[1][1].startswith("lost a peer on axis 'ring': heads")
    assert seen[2][1].startswith("lost a peer on axis 'data': all_reduce")


def closed_mesh(rank, size):
    """Whether torch still holds a closed mesh whose tensors were computed with."""
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    tensor = distribute_tensor(torch.ones(2 * size), mesh.fsdp_mesh, [Shard(0)])
    total = float((2 * tensor).sum().full_tensor())
    known = [weakref.ref(mesh.fsdp_mesh), weakref.ref(mesh._device_mesh)]
    mesh.close()
    del mesh, tensor
    gc.collect()
    return total, [ref() is not None for ref in known]


def test_nothing_holds_a_closed_mesh_and_its_threads():
    assert run_ranks(closed_mesh, 2) == [(8.0, [False, False])] * 2
