"""A poisoned document: with it left out, training is the run that never saw its batch, bit for bit."""

import hashlib
import json

import pytest
from ranks import run_ranks
from tiny import make_config

from longctx.config.load import load
from longctx.errors import ConfigError

COMMON = (
    "train.steps=40",
    "train.spike_z=6",
    "train.eval_every=0",
    "data.held_out=0",
    "train.lr=1e-2",
    "run.seed=2",
)
EXACT = ("step", "tokens", "loss", "grad_norm", "lr")


def run_one(rank, size, base, name, extra):
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from longctx.build import World
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    store = dist.FileStore(str(base / f"{name}.store"), size)
    store.set_timeout(timedelta(seconds=60))
    config = make_config(base, name, size=size, layout={"dp_shard": size}, extra=(*COMMON, *extra))
    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store)
    return train(config, Fixed(world))


def run_hurt(rank, size, base, name, extra):
    """Batches 3 and 4 are spikes, whatever is in them."""
    from longctx.spike import LossSpike
    from longctx.train import loop

    step = loop.train_step

    def judged(run, learning_rate, **options):
        if run.progress.batch() in (3, 4):
            raise LossSpike("a rehearsed spike")
        return step(run, learning_rate, **options)

    loop.train_step = judged
    return run_one(rank, size, base, name, extra)


def trained(base, name, *extra, size=2):
    return set(run_ranks(run_one, size, base, name, extra, init=False))


def rows(base, name):
    lines = [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in EXACT] for row in lines]


def spikes(base, name):
    lines = [json.loads(line) for line in (base / name / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] == "spike"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A corpus of one word and a document of something else."""
    base = tmp_path_factory.mktemp("poisoned")
    (base / "docs").mkdir()
    for number in range(120):
        (base / "docs" / f"doc{number:03d}.txt").write_text("ab " * (100 + number))
    (base / "docs" / "poison.txt").write_text("".join(chr(200 + i * 7 % 500) for i in range(250)))
    return base


def test_a_poisoned_batch_is_left_out_and_the_rest_is_the_run_without_it(poisoned):
    assert trained(poisoned, "rewound", "train.on_spike=rewind") == {0}
    found = spikes(poisoned, "rewound")
    for event in found:
        assert any("poison.txt" in name for name in event["documents"])
        assert event["skipped"] == [event["batch"]] and event["back_to"] == event["step"] - 1
    batches = [event["batch"] for event in found]
    assert batches, "the corpus is poisoned"

    assert trained(poisoned, "without", f"train.skip_batches={batches}") == {0}
    assert spikes(poisoned, "without") == []
    assert rows(poisoned, "rewound") == rows(poisoned, "without")

    assert trained(poisoned, "skipped", "train.on_spike=skip") == {0}
    assert rows(poisoned, "skipped") == rows(poisoned, "without")


def checkpoints(base, name):
    """Content of the tensor files of each checkpoint."""
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((base / name / "ckpt").glob("step-*/*.safetensors"))
    }


def test_a_second_spike_undoes_a_step_its_line_and_its_checkpoint_for_good(poisoned):
    saved = ("train.steps=7", "checkpoint.every=1", "checkpoint.keep=0")
    hurt = ("train.on_spike=rewind", *saved)
    assert set(run_ranks(run_hurt, 1, poisoned, "undone", hurt, init=False)) == {0}
    assert [event["skipped"] for event in spikes(poisoned, "undone")] == [[3], [2, 3, 4]]
    assert trained(poisoned, "plain", "train.skip_batches=[2,3,4]", *saved, size=1) == {0}
    assert rows(poisoned, "undone") == rows(poisoned, "plain")
    assert len(checkpoints(poisoned, "plain")) == 7
    assert checkpoints(poisoned, "undone") == checkpoints(poisoned, "plain")
    text = (poisoned / "undone" / "events.jsonl").read_text()
    assert '"mismatch"' not in text
    lines = [json.loads(line) for line in (poisoned / "undone" / "metrics.jsonl").read_text().splitlines()]
    useful = sum(line["step_time_s"] for line in lines)
    assert lines[-1]["goodput"] * lines[-1]["run_s"] == pytest.approx(useful)


def test_stop_names_the_documents_and_where_to_go_on(poisoned):
    assert trained(poisoned, "stopped") == {1}
    summary = json.loads((poisoned / "stopped" / "summary.json").read_text())
    assert "poison.txt" in summary["error"] and "train.on_spike=skip or rewind" in summary["error"]


def test_more_spikes_than_allowed_end_with_65(poisoned):
    assert trained(poisoned, "often", "train.on_spike=rewind", "train.max_spikes=0") == {65}
    assert "train.max_spikes" in json.loads((poisoned / "often" / "summary.json").read_text())["error"]


def test_an_unknown_answer_is_refused():
    with pytest.raises(ConfigError, match=r"train\.on_spike"):
        load([], ["train.on_spike=pray"])
