"""Every axis with every other: loss and every parameter's gradient equal one process."""

import json
import shutil

import pytest
from compose_ranks import assert_equal_to_one, run_one_step
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx.recovery.members import Fixed
from longctx.train.loop import train

KINDS = {
    "plain": (),
    "untied-bias-norm": ("model.tied_embeddings=false", "model.attention_bias=true", "model.qk_norm=true"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compose")
    write_corpus(folder / "docs")
    return folder


@pytest.fixture(scope="module")
def one(base):
    known = {}

    def reference(*extra: str):
        if extra not in known:
            known[extra] = run_one_step(base, {}, extra, label="reference-")[0]
        return known[extra]

    return reference


TENSOR = [{"tp": 2}, {"tp": 4}, {"dp_shard": 2, "tp": 2}]
QUICK = {("plain", "float32", 2), ("untied-bias-norm", "float32", 0)}
"""Single precision once with FSDP and once without; the rest of it is in the slow tests."""


@pytest.mark.parametrize(
    ("layout", "kind", "dtype"),
    [
        pytest.param(
            layout,
            kind,
            dtype,
            marks=() if dtype == "float64" or (kind, dtype, number) in QUICK else pytest.mark.slow,
        )
        for number, layout in enumerate(TENSOR)
        for kind in KINDS
        for dtype in ("float32", "float64")
    ],
    ids=str,
)
def test_tensor_parallel_equals_one_process(base, one, layout, kind, dtype):
    extra = (f"train.dtype={dtype}", *KINDS[kind])
    assert_equal_to_one(run_one_step(base, layout, extra, label=f"{kind}-"), one(*extra), dtype)


def train_rank(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> int:
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    return train(config, Fixed(make_world(base / name, rank, size)))


def run_training(base, name: str, size: int, layout: dict, *extra: str) -> list[dict]:
    (base / name).mkdir(exist_ok=True)
    (base / name / "rendezvous").unlink(missing_ok=True)
    assert run_ranks(train_rank, size, base, name, layout, extra, init=False) == [0] * size
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


LAYOUTS = {"tp2": (2, {"tp": 2}), "tp4": (4, {"tp": 4}), "shard2": (2, {"dp_shard": 2})}


SIX_STEPS = ("train.dtype=float64", "checkpoint.every=3", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def six_steps(base):
    """Six steps in one process."""
    return run_training(base, "move-one", 1, {}, *SIX_STEPS)


@pytest.mark.parametrize("first,second", [("tp2", "shard2"), ("shard2", "tp2"), ("tp2", "tp4")])
def test_a_checkpoint_moves_between_tp_and_fsdp(base, six_steps, first, second):
    """Three steps in one layout and three in another are six steps in one process."""
    name = f"move-{first}-{second}"
    run_training(base, name, *LAYOUTS[first], *SIX_STEPS)
    shutil.rmtree(base / name / "ckpt" / "step-00000006")
    found = run_training(base, name, *LAYOUTS[second], *SIX_STEPS, "run.resume=true")
    for key in ("loss", "grad_norm", "held_out_loss"):
        want = [row[key] for row in six_steps if key in row]
        assert [row[key] for row in found if key in row] == pytest.approx(want, rel=1e-10)
