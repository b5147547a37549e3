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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 4}, {"dp_shard": 2, "tp": 2}], ids=str)
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


@pytest.mark.parametrize("first,second", [("tp2", "shard2"), ("shard2", "tp2"), ("tp2", "tp4")])
def test_a_checkpoint_moves_between_tp_and_fsdp(base, first, second):
    """Three steps in one layout and three in another are six steps in one process."""
    extra = ("train.dtype=float64", "checkpoint.every=3", "checkpoint.keep=9")
    name = f"move-{first}-{second}"
    expected = run_training(base, f"{name}-one", 1, {}, *extra)
    run_training(base, name, *LAYOUTS[first], *extra)
    shutil.rmtree(base / name / "ckpt" / "step-00000006")
    found = run_training(base, name, *LAYOUTS[second], *extra, "run.resume=true")
    for key in ("loss", "grad_norm", "held_out_loss"):
        want = [row[key] for row in expected if key in row]
        assert [row[key] for row in found if key in row] == pytest.approx(want, rel=1e-10)
