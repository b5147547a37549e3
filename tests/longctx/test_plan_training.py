"""Adaptive sequence groups in the training step: the objective is the same under every plan."""

import json
import shutil

import pytest
from compose_ranks import assert_equal_to_one
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from parallel.planner.sequence import Group, StepPlan

ADAPTIVE = ("step_plan.groups=adaptive", "step_plan.capacity_tokens=256")
MIXED = (
    "curriculum.kind=natural",
    "data.min_len=16",
    "data.seq_len=512",
    "train.microbatch_tokens=1024",
    "train.global_batch_tokens=2048",
)
PARTITIONS = {"4": (4,), "2-2": (2, 2), "2-1-1": (2, 1, 1), "1-1-1-1": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    write_corpus(folder / "docs", documents=60)
    return folder


def partition(lengths: list[int], degrees: tuple[int, ...], *, microbatches: int, empty: bool) -> StepPlan:
    """Pieces dealt out to the same groups in every microbatch; with `empty` one group never has any."""
    firsts = [sum(degrees[:i]) for i in range(len(degrees))]
    slots = [(m, g) for m in range(microbatches) for g in range(len(degrees) - (empty and len(degrees) > 1))]
    dealt = {slot: [i for i in range(len(lengths)) if slots[i % len(slots)] == slot] for slot in slots}
    groups = tuple(
        tuple(
            Group(degree=degree, first_rank=first, pieces=tuple(dealt.get((m, g), ())))
            for g, (degree, first) in enumerate(zip(degrees, firsts, strict=True))
        )
        for m in range(microbatches)
    )
    return StepPlan(microbatches=groups, time_ms=1.0, lower_bound_ms=1.0)


def one_plan(rank: int, size: int, base, name: str, case: tuple):
    """Sums, whole gradients, norm and calls of the first step, under a given partition if there is one."""
    from longctx.build import build
    from longctx.train.step import backward
    from parallel import grads

    layout, extra, degrees = case
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    batches = run.loader.step(0)
    if degrees is not None:
        plan = partition(run.loader.lengths(0), degrees, microbatches=3, empty=True)
        batches = run.loader.batches(0, plan)
        assert len(batches) == 3
    run.mesh.counter.reset()
    sums = backward(run, batches).tolist()
    calls = dict(run.mesh.counter.calls)
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    norm = float(grads.clip_(run.model.parameters(), 0.0, mesh=run.mesh))
    run.close()
    return sums, found, norm, calls


def run_plan(base, label: str, layout: dict, extra: tuple[str, ...], degrees=None) -> list:
    size = layout.get("dp_shard", 1) * layout.get("tp", 1) * layout.get("dp_replicate", 1)
    (base / label).mkdir()
    return run_ranks(one_plan, size, base, label, (layout, extra, degrees), init=False)


@pytest.fixture(scope="module", params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def reference(base, request):
    extra = (*MIXED, f"train.dtype={request.param}")
    return request.param, run_plan(base, f"one-{request.param}", {}, extra)[0][:3]


@pytest.mark.parametrize("name", list(PARTITIONS))
def test_gradients_of_any_two_plans_equal_one_process(base, reference, name):
    dtype, expected = reference
    extra = (*MIXED, *ADAPTIVE, f"train.dtype={dtype}")
    results = run_plan(base, f"plan-{name}-{dtype}", {"dp_shard": 4}, extra, PARTITIONS[name])
    assert_equal_to_one([result[:3] for result in results], expected, dtype)
    assert_members_call_alike(results, PARTITIONS[name])


FREE = "step_plan.lockstep=false"


def uneven(lengths: list[int]) -> StepPlan:
    """Four microbatches in which ranks 0 to 3 have pieces in 2, 2, 3 and 3."""
    third = len(lengths) // 3
    parts = [list(range(n * third, (n + 1) * third)) for n in range(3)]
    parts[2] = list(range(2 * third, len(lengths)))
    halves = parts[1][::2], parts[1][1::2]
    shapes = [
        [(4, parts[0])],
        [(2, []), (1, halves[0]), (1, [])],
        [(2, parts[2][::2]), (1, []), (1, halves[1])],
        [(2, []), (2, parts[2][1::2])],
    ]
    microbatches = []
    for shape in shapes:
        firsts = [sum(degree for degree, _ in shape[:i]) for i in range(len(shape))]
        groups = [Group(d, first, tuple(own)) for (d, own), first in zip(shape, firsts, strict=True)]
        microbatches.append(tuple(groups))
    return StepPlan(microbatches=tuple(microbatches), time_ms=1.0, lower_bound_ms=1.0)


def free_step(rank: int, size: int, base, name: str, case: tuple):
    """`one_plan` of a plan whose ranks have different numbers of microbatches, and how many forwards ran."""
    from longctx.build import Run, build
    from longctx.train.step import backward
    from parallel import grads

    layout, extra = case
    run = build(
        make_config(base, name, size=size, layout=layout, extra=extra), make_world(base / name, rank, size)
    )
    batches = run.loader.batches(0, uneven(run.loader.lengths(0)))
    forwards, plain = [0], Run.forward

    def counted(self, batch, **options):
        forwards[0] += batch.num_tokens > 0
        return plain(self, batch, **options)

    Run.forward = counted
    try:
        for _ in range(2):  # the second must not use what the first has gathered
            run.optimizer.zero_grad()
            sums = backward(run, batches).tolist()
    finally:
        Run.forward = plain
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    norm = float(grads.clip_(run.model.parameters(), 0.0, mesh=run.mesh))
    run.close()
    return sums, found, norm, forwards[0]


@pytest.mark.parametrize(
    "layout", [{"dp_shard": 4}, pytest.param({"dp_shard": 4, "tp": 2}, marks=pytest.mark.slow)], ids=str
)
def test_ranks_with_different_numbers_of_microbatches_have_the_gradients_of_one_process(base, layout):
    extra, label = (*MIXED, "train.dtype=float64"), "-".join(layout)
    expected = run_plan(base, f"one-free-{label}", {}, extra)[0][:3]
    (base / f"free-{label}").mkdir()
    size, tp = 4 * layout.get("tp", 1), layout.get("tp", 1)
    case = (layout, (*extra, *ADAPTIVE, FREE))
    results = run_ranks(free_step, size, base, f"free-{label}", case, init=False)
    assert [result[3] for result in results[::tp]] == [2 * n for n in (2, 2, 3, 3)]
    assert_equal_to_one([result[:3] for result in results], expected, "float64")


@pytest.mark.parametrize("name", ["2-1-1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("4", "2-2"))])
def test_gradients_of_a_plan_with_tensor_parallelism(base, name):
    extra = (*MIXED, "train.dtype=float64")
    expected = run_plan(base, f"one-tp-{name}", {}, extra)[0][:3]
    layout = {"dp_shard": 4, "tp": 2}
    results = run_plan(base, f"tp-{name}", layout, (*extra, *ADAPTIVE), PARTITIONS[name])
    assert_equal_to_one([result[:3] for result in results], expected, "float64")
    assert_members_call_alike(results, PARTITIONS[name], tp=2)


def assert_members_call_alike(results: list, degrees: tuple[int, ...], tp: int = 1) -> None:
    """Ranks of one group start equally many of every kind of collective, and so does the step's end."""
    calls, first = [result[3] for result in results], 0
    assert len({counted.get("all_reduce", 0) for counted in calls}) == 1
    for degree in degrees:
        members = calls[first * tp : (first + degree) * tp]
        assert all(counted == members[0] for counted in members)
        first += degree


@pytest.mark.parametrize("layout", [{"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}])
def test_gradients_under_the_planner_s_own_plan_with_tp_and_replicas(base, layout):
    extra = (*MIXED, *ADAPTIVE, "train.dtype=float64")
    label = "-".join(layout)
    expected = run_plan(base, f"one-{label}", {}, (*MIXED, "train.dtype=float64"))[0][:3]
    results = run_plan(base, f"own-{label}", layout, extra)
    assert_equal_to_one([result[:3] for result in results], expected, "float64")


def whole_run(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> int:
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    config = make_config(base, name, size=size, layout=layout, extra=extra)
    return train(config, Fixed(make_world(base / name, rank, size)))


def rows_of(base, name: str, layout: dict, extra: tuple[str, ...]) -> list[dict]:
    size = layout.get("dp_shard", 1) * layout.get("tp", 1)
    (base / name).mkdir(exist_ok=True)
    assert run_ranks(whole_run, size, base, name, layout, extra, init=False) == [0] * size
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_planned_groups_has_the_losses_of_one_process_and_says_its_plan(base):
    extra = (*MIXED, "train.dtype=float64", "train.steps=4", "train.eval_every=2")
    expected = rows_of(base, "run-one", {}, extra)
    found = rows_of(base, "run-planned", {"dp_shard": 4}, (*extra, *ADAPTIVE))
    for key in ("loss", "held_out_loss", "held_out_bits_per_byte", "grad_norm", "tokens"):
        want = [row[key] for row in expected if key in row]
        assert want
        assert [row[key] for row in found if key in row] == pytest.approx(want, rel=1e-10), key
    for row in found:
        assert row["plan_groups"] >= 1
        assert row["plan_predicted_ms"] > 0
        assert row["max_document_tokens"] > 256  # longer than one rank holds


def test_a_run_without_lockstep_has_the_losses_of_one_process(base):
    extra = (*MIXED, "train.dtype=float64", "train.steps=3", "train.eval_every=2")
    expected = rows_of(base, "pace-one", {}, extra)
    found = rows_of(base, "pace-free", {"dp_shard": 4}, (*extra, *ADAPTIVE, FREE))
    for key in ("loss", "held_out_loss", "grad_norm"):
        want = [row[key] for row in expected if key in row]
        assert [row[key] for row in found if key in row] == pytest.approx(want, rel=1e-10), key


@pytest.mark.parametrize(
    ("layout", "extra", "words"),
    [
        ({"pp": 2}, (), "does not work with parallel.pp=2.*set step_plan.lockstep=true"),
        ({"dp_shard": 2}, ("parallel.reshard_after_forward=true",), "auto or false, not true"),
    ],
)
def test_own_pace_is_refused_where_ranks_meet_in_the_middle_of_a_step(base, layout, extra, words):
    from longctx.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        make_config(base, "none", size=2, layout=layout, extra=(*MIXED, FREE, *extra))


def test_a_planned_run_resumes_in_another_world_with_the_losses_of_the_uninterrupted_one(base):
    extra = (*MIXED, *ADAPTIVE, "train.dtype=float64", "train.eval_every=0", "step_plan.capacity_tokens=512")
    expected = rows_of(base, "whole", {"dp_shard": 4}, (*extra, "train.steps=4"))
    stopped = (*extra, "train.steps=4", "checkpoint.every=2", "checkpoint.background=false")
    rows_of(base, "resumed", {"dp_shard": 4}, stopped)
    for path in (base / "resumed" / "ckpt").glob("*4"):
        shutil.rmtree(path)
    (base / "resumed" / "rendezvous").unlink()
    found = rows_of(base, "resumed", {"dp_shard": 2}, (*stopped, "run.resume=true"))
    events = (base / "resumed" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in events if '"start"' in line] == [0, 2]
    for key in ("loss", "grad_norm", "tokens", "documents"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-10), key


def verify_rank(rank: int, size: int, base) -> int:
    from longctx.train.verify import verify

    config = make_config(base, "verify", size=size, layout={"dp_shard": 2}, extra=(*MIXED, *ADAPTIVE))
    return verify(config, make_world(base / "verify", rank, size))


def test_verify_compares_a_planned_step_with_one_process(base):
    (base / "verify").mkdir()
    assert run_ranks(verify_rank, 2, base, init=False) == [0, 0]


def test_whole_documents_are_planned_too(base):
    extra = ("train.dtype=float64", "train.steps=2", "train.eval_every=0")
    expected = rows_of(base, "documents-one", {}, extra)
    found = rows_of(base, "documents-planned", {"dp_shard": 2}, (*extra, *ADAPTIVE))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-10)


def test_a_sequence_longer_than_all_ranks_is_refused_before_anything_starts(base):
    from longctx.errors import ConfigError

    with pytest.raises(ConfigError, match=r"data.seq_len=512 .* 2 data ranks .* longest that fits is 256"):
        make_config(
            base,
            "none",
            size=2,
            layout={"dp_shard": 2},
            extra=(*MIXED, ADAPTIVE[0], "step_plan.capacity_tokens=128"),
        )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("parallel.ring=2", "parallel.dp_shard=1"), "parallel.ring=2"),
        (("attention.strategy=ulysses",), "attention.strategy=usp"),
    ],
)
def test_adaptive_groups_refuse_a_fixed_split(base, extra, words):
    from longctx.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        make_config(base, "none", size=2, layout={"dp_shard": 2}, extra=(*MIXED, *ADAPTIVE, *extra))
