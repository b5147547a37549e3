"""Pipelines of every schedule and composition: loss, norm and every gradient of one process."""

import pytest
from pipeline_ranks import assert_equal, one_step, run_step, swapped_reference
from tiny import make_config, make_world, write_corpus

from longctx.build import build
from longctx.train.step import evaluate

EIGHT = "model.num_layers=8"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_corpus(folder / "docs")
    return folder


@pytest.fixture(scope="module")
def references(base):
    """What one process computes, by the options that change it."""
    found = {}

    def reference(*extra: str, function=one_step):
        key = (*extra, function.__name__)
        if key not in found:
            found[key] = run_step(base, {}, extra, function=function)[0]
        return found[key]

    return reference


def case(name: str, layout: dict, *extra: str, model: tuple[str, ...] = (), marks=()):
    return pytest.param(layout, extra, model, id=name, marks=marks)


CASES = [
    case("gpipe", {"pp": 2}, "pipeline.schedule=gpipe", marks=slow),
    case("1f1b", {"pp": 2}, "pipeline.schedule=1f1b", "pipeline.speeds=[1,3]"),
    case("interleaved", {"pp": 2}, "pipeline.schedule=interleaved", marks=slow),
    case("zb-h1", {"pp": 2}, "pipeline.schedule=zb-h1", marks=slow),
    case(
        "zb-v-untied-biases",
        {"pp": 2},
        "pipeline.schedule=zb-v",
        model=("model.tied_embeddings=false", "model.attention_bias=true", "model.qk_norm=true"),
    ),
    case("resharded", {"pp": 2, "dp_shard": 2}, "parallel.reshard_after_forward=true", marks=slow),
    *(case(f"4-{name}", {"pp": 4}, f"pipeline.schedule={name}", marks=slow) for name in ("gpipe", "1f1b")),
    case("4-zb-h1", {"pp": 4}, "pipeline.schedule=zb-h1", marks=slow),
    case("4-interleaved", {"pp": 4}, "pipeline.schedule=interleaved", model=(EIGHT,), marks=slow),
    case("4-zb-v", {"pp": 4}, "pipeline.schedule=zb-v", model=(EIGHT,), marks=slow),
    case("1f1b-fsdp-ring", {"pp": 2, "dp_shard": 2, "ring": 2}),
    case("zb-v-ulysses-tp", {"pp": 2, "ulysses": 2, "tp": 2}, "pipeline.schedule=zb-v"),
    case(
        "interleaved-replicas-fsdp",
        {"pp": 2, "dp_replicate": 2, "dp_shard": 2},
        "pipeline.schedule=interleaved",
        marks=slow,
    ),
    case("zb-h1-tp", {"pp": 2, "tp": 2}, "pipeline.schedule=zb-h1", "train.recompute=full", marks=slow),
    case("adaptive", {"pp": 2, "dp_shard": 2}, "step_plan.groups=adaptive"),
    case("slices", {"pp": 2}, "pipeline.slices=4", "train.recompute=full"),
    case(
        "slices-gpipe-window", {"pp": 2}, "pipeline.slices=4", model=("model.sliding_window=64",), marks=slow
    ),
    case("slices-ring", {"pp": 2, "ring": 2}, "pipeline.slices=4"),
    case(
        "slices-ulysses-ring-window",
        {"pp": 2, "ring": 2, "ulysses": 2},
        "pipeline.slices=3",
        model=("model.sliding_window=64",),
        marks=slow,
    ),
    case("slices-tp", {"pp": 2, "tp": 2}, "pipeline.slices=5", marks=slow),
]


@pytest.mark.parametrize("layout,extra,model", CASES)
def test_pipeline_equals_one_process(base, references, layout, extra, model):
    assert_equal(run_step(base, layout, (*model, *extra)), references(*model))


@pytest.mark.parametrize(
    "schedule,layout",
    [("1f1b", {"pp": 4}), pytest.param("gpipe", {"pp": 4, "dp_shard": 2}, marks=slow)],
    ids=str,
)
def test_swapped_ends_equal_each_microbatch_in_its_own_order(base, references, schedule, layout):
    extra = (f"pipeline.schedule={schedule}", "pipeline.swap_ends=true")
    groups = layout.get("dp_shard", 1)
    expected = references(f"GROUPS={groups}", function=swapped_reference)
    assert_equal(run_step(base, layout, extra), expected)
    straight = references()
    assert abs(straight[2] - expected[2]) > 1e-6 * straight[2]  # it is another function


def held_out_loss(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> float:
    """Of the model as it is initialized."""
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    loss = evaluate(run)["held_out_loss"]
    run.close()
    return loss


def test_evaluation_runs_in_straight_order_also_with_swapped_ends(base):
    extra = ("data.held_out=0.3", "train.eval_tokens=2048")
    swapped = run_step(base, {"pp": 4}, (*extra, "pipeline.swap_ends=true"), function=held_out_loss)
    assert swapped == [pytest.approx(run_step(base, {}, extra, function=held_out_loss)[0], rel=1e-12)] * 4


def test_float32_equals_one_process(base, references):
    model = ("train.dtype=float32",)
    found = run_step(base, {"pp": 2, "dp_shard": 2}, (*model, "pipeline.schedule=zb-v"))
    assert_equal(found, references(*model), "float32")
