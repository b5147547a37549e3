"""Placement, agreement, generations, twins and spikes: without processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.config.check import check_replicas
from longctx.config.load import load
from longctx.errors import ConfigError
from longctx.recovery.faults import Fault, Faults, InjectedError, write_plan
from longctx.recovery.generations import DamagedError, Shelf, Slot, State, meta_of, seal
from longctx.recovery.memory import available_bytes, predicted_bytes
from longctx.recovery.placement import Inventory, agree, missing, shifts, twins
from longctx.recovery.twins import first_difference
from longctx.spike import LossSpike, SpikeWatch, robust_z
from longctx.world import Progress


def test_copies_go_to_other_nodes_and_not_to_neighbouring_stages():
    assert shifts((1, 1, 4), node_ranks=4, replicas=1) == (1,)
    assert shifts((1, 1, 8), node_ranks=4, replicas=1) == (4,)
    assert shifts((4, 1, 1), node_ranks=4, replicas=1) == (2,)  # 1 and 3 are neighbours
    assert shifts((4, 1, 4), node_ranks=4, replicas=1) == (8,)
    assert len(shifts((1, 1, 3), node_ranks=3, replicas=5)) == 2


def test_no_copy_goes_to_a_twin_while_another_rank_is_there():
    assert shifts((1, 2, 4), node_ranks=4, replicas=1) == (3,)  # rank r + 4, on the other node, is its twin
    for shift in shifts((1, 2, 2), node_ranks=4, replicas=2):
        assert all((rank + shift) % 4 not in twins((1, 2, 2), rank) for rank in range(4))


@given(nodes=st.integers(1, 4), node_ranks=st.integers(1, 4), replicas=st.integers(1, 3))
def test_no_copy_stays_on_its_node_where_there_is_another(nodes, node_ranks, replicas):
    size = nodes * node_ranks
    found = shifts((1, 1, size), node_ranks=node_ranks, replicas=replicas)
    assert len(set(found)) == len(found) == min(replicas, size - 1)
    if nodes > 1:
        holders = [(rank + found[0]) % size for rank in range(size)]
        assert all(rank // node_ranks != holder // node_ranks for rank, holder in enumerate(holders))


def test_twins_differ_along_dp_replicate_alone():
    # pp 2 x dp_replicate 2 x dp_shard 2: ranks 0..3 are stage 0
    shape = (2, 2, 2, 1, 1, 1)
    assert [twins(shape, rank) for rank in range(8)] == [(2,), (3,), (0,), (1,), (6,), (7,), (4,), (5,)]
    assert twins((1, 1, 4, 1, 1, 1), 2) == ()


def inventory(own=(), **held):
    return Inventory(own=tuple(own), held={int(k[1:]): tuple(v) for k, v in held.items()})


def test_the_newest_step_of_which_every_state_exists_is_agreed_on():
    alive = [inventory([7, 8], r3=[7, 8]), inventory([7, 8], r0=[7]), inventory([7, 8], r1=[7, 8])]
    lost = inventory()
    found = agree([*alive, lost], [()] * 4)
    assert found is not None and (found.step, found.source) == (8, (0, 1, 2, 0))
    torn = [inventory([7, 8], r3=[7]), *alive[1:], lost]
    found = agree(torn, [()] * 4)
    assert found is not None and (found.step, found.source) == (7, (0, 1, 2, 0))
    assert agree([inventory([8]), *alive[1:], lost], [()] * 4) is None
    assert missing([inventory([8]), *alive[1:], lost], [()] * 4) == [3]


def test_a_twins_own_state_serves_as_a_copy():
    found = agree([inventory([5]), inventory()], [(1,), (0,)])
    assert found is not None and (found.step, found.source) == (5, (0, 0))


@given(st.data())
def test_agreement_is_what_trying_every_step_finds(data):
    size = data.draw(st.integers(1, 4))
    steps = st.lists(st.integers(0, 3), max_size=2, unique=True)
    states = [
        Inventory(
            own=tuple(data.draw(steps)),
            held={owner: tuple(data.draw(steps)) for owner in range(size) if owner != rank},
        )
        for rank in range(size)
    ]

    def exists(rank, step):
        return step in states[rank].own or any(step in s.held.get(rank, ()) for s in states)

    best = max((s for s in range(4) if all(exists(r, s) for r in range(size))), default=None)
    found = agree(states, [()] * size)
    assert (found.step if found else None) == best
    if found:
        for rank, source in enumerate(found.source):
            holder = states[source]
            assert found.step in (holder.own if source == rank else holder.held[rank])


def tensors():
    torch.manual_seed(0)
    return {
        "model.a": torch.randn(3, 5),
        "model.empty": torch.empty(0, 4),
        "optim.a.exp_avg": torch.randn(3, 5, dtype=torch.float64),
        "model.half": torch.randn(7).bfloat16(),
    }


def test_a_generation_comes_back_bit_for_bit_with_its_meta():
    source, target = tensors(), {name: torch.zeros_like(t) for name, t in tensors().items()}
    slot = Slot()
    State(source).pack(slot, {"row": {"loss": 0.1}}, step=3)
    seal(slot)
    State(target).unpack(slot)
    assert slot.step == 3 and slot.intact() and meta_of(slot) == {"row": {"loss": 0.1}}
    assert all(torch.equal(source[name], target[name]) for name in source)


def test_a_flipped_bit_anywhere_is_noticed_and_the_generation_dropped():
    shelf = Shelf()
    for step in (1, 2):
        slot = shelf.oldest()
        State(tensors()).pack(slot, {}, step=step)
        seal(slot)
    assert shelf.steps() == [1, 2]
    damaged = shelf.at(2)
    for at in (0, damaged.used // 2, damaged.used - 1):
        damaged.buffer[at] ^= 4
        assert not damaged.intact()
        damaged.buffer[at] ^= 4
    damaged.buffer[5] ^= 1
    assert shelf.steps() == [1] and shelf.at(2) is None


def test_the_oldest_generation_is_overwritten_and_a_half_written_one_does_not_count():
    shelf = Shelf()
    for step in (4, 5, 6):
        State(tensors()).pack(shelf.oldest(), {}, step=step)
    assert {slot.step for slot in shelf.slots} == {5, 6}
    shelf.oldest().reserve(10)
    assert {slot.step for slot in shelf.slots} == {None, 6}
    shelf.drop_after(5)
    assert shelf.count() == 0


def test_a_few_bytes_more_of_json_take_no_new_memory():
    slot, state = Slot(), State(tensors())
    state.pack(slot, {"losses": []}, step=0)
    before = slot.buffer.data_ptr()
    state.pack(slot, {"losses": [0.1] * 64}, step=1)
    assert slot.buffer.data_ptr() == before and meta_of(slot) == {"losses": [0.1] * 64}


def test_a_generation_of_another_layout_is_refused():
    slot = Slot()
    State(tensors()).pack(slot, {}, step=0)
    other = tensors() | {"model.a": torch.zeros(5, 3)}
    with pytest.raises(DamagedError, match=r"model\.a"):
        State(other).unpack(slot)


def test_memory_is_predicted_from_ranks_and_copies(tmp_path):
    assert predicted_bytes(100, replicas=1, local_ranks=4) == 100 * 2 * 2 * 4
    assert predicted_bytes(100, replicas=0, local_ranks=1) == 200
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:    12 kB\n")
    assert available_bytes(tmp_path) == 12 * 1024


@pytest.mark.parametrize(
    ("entry", "top", "names"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_job_has_no_more_memory_than_the_limits_of_its_groups(tmp_path, entry, top, names):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 12 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"1:devices:/else\n{entry}\n")
    step = tmp_path / "sys" / "fs" / "cgroup" / top / "job" / "step"
    step.mkdir(parents=True)
    for group, limit in ((step, "max\n"), (step.parent, "9000\n")):
        (group / names[0]).write_text(limit)
        (group / names[1]).write_text("8000\n")
        (group / "memory.stat").write_text(f"anon 5\n{names[2]} 1000\n")
    assert available_bytes(tmp_path) == 2000
    (step.parent / names[0]).write_text("max\n")
    assert available_bytes(tmp_path) == 12 * 1024


def test_the_replica_in_the_minority_is_named_with_its_tensor():
    replicas = [{"rank": r, "host": f"h{r}", "digests": {"a": 1, "b": 2}} for r in (0, 4, 8)]
    assert first_difference(replicas) is None
    replicas[1]["digests"] = {"a": 1, "b": 3}
    problem = first_difference(replicas)
    assert problem is not None and "b on rank 4 (h4)" in problem and "[0, 8]" in problem
    problem = first_difference(replicas[:2])
    assert problem is not None and "b differs between rank 0 (h0), rank 4 (h4)" in problem


def test_a_robust_score_ignores_single_outliers():
    usual = (1.0, 1.1, 0.9, 1.0, 50.0, 1.05, 0.95, 1.0)
    assert robust_z(1.0, usual) < 0.5
    assert robust_z(3.0, usual) > 10
    assert robust_z(0.5, usual) < 0  # falling is no spike


def test_what_is_not_finite_is_a_spike_at_once_and_the_rest_only_beyond_the_threshold():
    watch = SpikeWatch(0.0)
    with pytest.raises(LossSpike, match="nan"):
        watch.judge(math.nan, 1.0)
    for step in range(40):
        watch.judge(2.0 + 0.01 * (step % 7), 1.0)
    watch.judge(1e6, 1e6)  # no threshold
    strict = SpikeWatch(8.0)
    for step in range(15):
        strict.judge(2.0 + 0.01 * (step % 7), 1.0)
    strict.judge(90.0, 1.0)  # too few to compare with
    with pytest.raises(LossSpike, match=r"gradient norm .*train\.spike_z=8"):
        strict.judge(2.0, 40.0)
    other = SpikeWatch(8.0)
    other.restore(strict.state())
    assert other.state() == strict.state()


@given(st.lists(st.integers(0, 12), max_size=6, unique=True))
def test_batches_are_taken_in_order_without_the_skipped_ones(skipped):
    progress = Progress(skipped=sorted(skipped))
    assert [progress.batch(step) for step in range(8)] == [b for b in range(20) if b not in skipped][:8]


def test_a_fault_strikes_once_in_the_life_of_a_run(tmp_path):
    write_plan([Fault(step=3, rank=1, phase="forward", kind="exception")], tmp_path / "plan.json")
    faults = Faults.read(str(tmp_path / "plan.json"), rank=1)
    faults.strike(2, "forward")
    faults.strike(3, "backward")
    with pytest.raises(InjectedError):
        faults.strike(3, "forward")
    faults.strike(3, "forward")
    Faults.read(str(tmp_path / "plan.json"), rank=1).strike(3, "forward")  # its successor
    Faults.read(str(tmp_path / "plan.json"), rank=0).strike(3, "forward")


def test_faults_that_can_never_strike_are_refused():
    for fault, words in (
        (Fault(step=1, rank=0, phase="lunch"), "phase 'lunch'"),
        (Fault(step=1, rank=0, phase="data", kind="meteor"), "kind 'meteor'"),
        (Fault(step=1, rank=9, phase="data"), "rank 9"),
        (Fault(step=1, rank=0, phase="start"), "phase 'start'"),
        (Fault(step=6, rank=0, phase="data"), "step 6 is not one of 0 to 5"),
        (Fault(step=-5, rank=0, phase="data"), "step -5"),
    ):
        with pytest.raises(ConfigError, match=words):
            fault.check(4, 6)


def test_more_copies_than_other_ranks_are_refused():
    config = load([], ["recovery.replicas=2"]).config
    check_replicas(config, 3)
    check_replicas(config, 1)  # nothing is replicated
    with pytest.raises(ConfigError, match=r"recovery\.replicas=2 .* 2 processes; set it to at most 1"):
        check_replicas(config, 2)
