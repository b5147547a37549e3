"""Generations between real processes: what holders end up with, and a rank that has lost its own."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from longctx.recovery.generations import DamagedError, Shelf, Slot, seal
from longctx.recovery.placement import Inventory, agree
from longctx.recovery.replicate import Memory, Replication
from parallel import comm
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, build_mesh

SIZE, SHIFTS, LAST = 3, (1, 2), 153


def content(rank: int, step: int) -> torch.Tensor:
    """[n] uint8; lengths differ by rank and step, and some are a single byte."""
    length = 1 + (7919 * rank + 104729 * step) % 100_000 * (step % 5 > 0)
    return torch.arange(length).mul_(rank + 1).add_(step).to(torch.uint8)


def write(memory: Memory, rank: int, step: int) -> Slot:
    slot, data = memory.own.oldest(), content(rank, step)
    slot.reserve(data.numel()).copy_(data)
    slot.step = step
    return slot


def replicated(rank: int, size: int) -> tuple[Mesh, Memory, Replication]:
    """Generations one after the other, each as soon as all ranks say that the last is complete."""
    mesh, memory = build_mesh(ParallelConfig(dp_shard=size), "cpu"), Memory()
    replication = Replication(memory, mesh.host_group(), SHIFTS)
    for step in range(1, LAST + 1):
        replication.send(write(memory, rank, step))
        while any_is_behind(replication, mesh):
            replication.wait()
    return mesh, memory, replication


def any_is_behind(replication: Replication, mesh: Mesh) -> bool:
    behind = torch.tensor([float(not replication.complete)])
    return bool(comm.all_reduce(behind, group=mesh.group("world"), op="max"))


def _holders(rank, size):
    _, memory, replication = replicated(rank, size)
    replication.close()
    held = memory.held.items()
    return {owner: {step: shelf.at(step).bytes().clone() for step in shelf.steps()} for owner, shelf in held}


def test_holders_have_the_two_newest_generations_of_their_owners():
    for rank, held in enumerate(run_ranks(_holders, SIZE)):
        assert set(held) == {(rank - shift) % SIZE for shift in SHIFTS}
        for owner, generations in held.items():
            assert set(generations) == {LAST - 1, LAST}
            assert all(torch.equal(data, content(owner, step)) for step, data in generations.items())


def _fetches(rank, size, lost, damaged):
    _, memory, replication = replicated(rank, size)
    if rank in lost:
        memory.own, memory.held = Shelf(), {}
    inventories = [None] * size
    dist.all_gather_object(inventories, memory.inventory())
    inventories = [Inventory.of(found) for found in inventories]
    agreement = agree(inventories, [()] * size)
    if rank == damaged:
        for owner in lost:
            memory.held[owner].at(agreement.step).bytes()[0] += 1
    try:
        replication.fetch(agreement)
    except DamagedError as error:
        return str(error)
    finally:
        dist.barrier()  # gloo forgets what is not received yet when the handles go
        replication.close()
    return memory.own.at(agreement.step).bytes().clone()


@pytest.mark.parametrize("lost", [{0}, {2}, {0, 1}], ids=str)
def test_lost_states_come_from_their_holders(lost):
    for rank, own in enumerate(run_ranks(_fetches, SIZE, lost, None)):
        assert torch.equal(own, content(rank, LAST))


def test_a_state_that_changed_in_memory_is_not_taken():
    found = run_ranks(_fetches, SIZE, {1}, 0)
    assert found[1] == f"the state of step {LAST} from rank 0 arrived damaged"


def test_what_is_forgotten_is_nobodys_state():
    memory = Memory()
    for step in (7, 8):
        seal(write(memory, 0, step))
    assert memory.inventory() == {"own": [7, 8], "held": {}}
    memory.forget()
    assert memory.inventory() == {"own": [], "held": {}}
