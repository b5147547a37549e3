"""Schedules on paper: they end, they are complete, and they wait as long as the formula says."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError, PlanError
from parallel.pipeline.schedule import SCHEDULES, Spec, bubble, check_spec, make_schedule
from parallel.pipeline.simulate import Durations, simulate
from parallel.pipeline.stages import equal_layers, split_layers

RANKS, MICROBATCHES = st.integers(2, 8), st.integers(1, 16)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), ranks=RANKS, microbatches=MICROBATCHES)
def test_every_schedule_ends_with_the_formulas_bubble(name, ranks, microbatches):
    spec = Spec(name=name, ranks=ranks)
    timeline = simulate(make_schedule(spec, microbatches))
    formula = bubble(spec, microbatches)
    if formula is not None:
        assert timeline.bubble == pytest.approx(formula, abs=1e-9)
    else:
        assert name == "interleaved" and microbatches % ranks


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["gpipe", "1f1b"]), ranks=st.integers(4, 8), microbatches=MICROBATCHES)
def test_swapped_ends_end(name, ranks, microbatches):
    spec = Spec(name=name, ranks=ranks, swap_ends=True)
    schedule = make_schedule(spec, microbatches)
    assert simulate(schedule).makespan >= 3 * microbatches
    assert [hop.part for hop in schedule.placement.route(1)][1:3] == [1, 0]
    assert schedule.placement.hosts("embed") == (0, 1)
    assert schedule.placement.hosts("head") == (ranks - 2, ranks - 1)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    ranks=RANKS,
    microbatches=st.integers(1, 4),
    slices=st.integers(1, 16),
)
def test_slices_fill_the_pipeline_as_microbatches_do(name, ranks, microbatches, slices):
    spec = Spec(name=name, ranks=ranks, slices=slices)
    timeline = simulate(make_schedule(spec, microbatches))
    assert timeline.bubble == pytest.approx(bubble(spec, microbatches), abs=1e-9)


@pytest.mark.parametrize(
    "name,ranks,kept", [("1f1b", 4, 4), ("zb-h1", 4, 4), ("zb-v", 4, 8), ("gpipe", 4, 16)]
)
def test_inputs_kept_for_backward(name, ranks, kept):
    assert max(simulate(make_schedule(Spec(name=name, ranks=ranks), 16)).in_flight) == kept


def test_one_document_in_sixteen_slices_waits_less_than_a_fifth():
    assert simulate(make_schedule(Spec(ranks=4, slices=16), 1)).bubble <= 0.2
    assert simulate(make_schedule(Spec(ranks=4), 1)).bubble == pytest.approx(0.75)


def test_transfers_are_hidden_in_the_steady_state():
    schedule = make_schedule(Spec(name="gpipe", ranks=4), 16)
    slow = simulate(schedule, Durations(transfer=0.25)).makespan
    assert slow - simulate(schedule).makespan == pytest.approx(2 * 3 * 0.25)


def broken(change):
    """A schedule with rank 1's list changed."""
    schedule = make_schedule(Spec(ranks=2), 2)
    lists = list(schedule.lists)
    lists[1] = tuple(change(list(lists[1])))
    return replace(schedule, lists=tuple(lists))


def test_a_deadlock_is_found():
    def swap(actions):
        forwards = [i for i, a in enumerate(actions) if a.kind == "forward"]
        backward = next(i for i, a in enumerate(actions) if a.kind == "backward" and a.hop == 2)
        actions[forwards[0]], actions[backward] = actions[backward], actions[forwards[0]]
        return actions

    with pytest.raises(PlanError, match="never ends"):
        simulate(broken(swap))


def test_a_missing_and_a_repeated_computation_are_found():
    with pytest.raises(PlanError, match="computed 0 times"):
        simulate(broken(lambda actions: [a for a in actions if a.kind != "head"]))
    with pytest.raises(PlanError, match="computed 2 times"):
        simulate(broken(lambda actions: [*actions, next(a for a in actions if a.kind == "forward")]))


def test_messages_in_another_order_are_found():
    def swap(actions):
        first, second = [i for i, a in enumerate(actions) if a.kind == "receive"][:2]
        actions[first], actions[second] = actions[second], actions[first]
        return actions

    with pytest.raises(PlanError, match="another order"):
        simulate(broken(swap))


@pytest.mark.parametrize(
    "spec,layers,words",
    [
        (Spec(name="2f2b", ranks=2), 4, "2f2b.*choose one of"),
        (Spec(name="zb-v", ranks=2, slices=2), 4, "pipeline.slices=2 works with"),
        (Spec(ranks=2, slices=0), 4, "at least 1"),
        (Spec(name="zb-h1", ranks=4, swap_ends=True), 4, "pipeline.schedule=zb-h1; choose gpipe or 1f1b"),
        (Spec(ranks=2, swap_ends=True), 4, "parallel.pp=2; choose at least 4"),
        (Spec(ranks=4, swap_ends=True, slices=2), 4, "pipeline.slices=2; choose 1"),
        (Spec(ranks=4, swap_ends=True), 6, "does not divide model.num_layers=6"),
    ],
)
def test_what_a_schedule_does_not_do_is_refused_by_name(spec, layers, words):
    with pytest.raises(ConfigError, match=words):
        check_spec(spec, layers)


def test_layers_are_divided_by_cost_with_the_head():
    assert [len(r) for r in split_layers(16, (0, 1, 2, 3), ends=(0.0, 2.0))] == [4, 4, 5, 3]
    assert split_layers(3, (0, 1, 2)) == (range(0, 1), range(1, 2), range(2, 3))
    assert [len(r) for r in equal_layers(10, (0, 1, 2, 3))] == [2, 2, 3, 3]


def test_slower_ranks_get_fewer_layers():
    counts = [len(r) for r in split_layers(30, (0, 1, 2), speeds=(1.0, 1.0, 0.5))]
    assert counts == [12, 12, 6]


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(4, 9),
    head=st.floats(0, 4),
    speeds=st.lists(st.floats(0.5, 2), min_size=3, max_size=3),
)
def test_no_other_division_has_a_faster_slowest_rank(layers, head, speeds):
    def slowest(counts):
        extra = (0.0, 0.0, head)
        return max((n + e) / s for n, e, s in zip(counts, extra, speeds, strict=True))

    found = [len(r) for r in split_layers(layers, (0, 1, 2), ends=(0.0, head), speeds=speeds)]
    every = [(a, b, layers - a - b) for a in range(1, layers) for b in range(1, layers - a)]
    assert slowest(found) <= min(map(slowest, every)) + 1e-9


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: split_layers(3, (0, 1, 2, 3)), "needs at least 4 layers.*set parallel.pp=3"),
        (lambda: split_layers(8, (0, 1), speeds=(1.0,)), "a positive relative speed for each"),
        (lambda: split_layers(8, (0, 1), speeds=(1.0, 0.0)), "a positive relative speed for each"),
    ],
)
def test_stages_that_cannot_be_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
