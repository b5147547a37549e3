"""The loop end to end in one process: what a run folder holds, divergence, Weights & Biases."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.recovery.members import Fixed
from longctx.train.loop import train

PROMISED = """step tokens loss grad_norm lr step_time_s useful_tokens_per_s padded_tokens_per_s mfu
    peak_memory_gib data_wait_s""".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    write_corpus(folder / "docs")
    return folder


def train_rank(rank: int, size: int, base: Path, name: str, extra: tuple[str, ...]) -> int:
    config = make_config(base, name, size=size, layout={"ulysses": size}, extra=extra)
    return train(config, Fixed(make_world(base / name, rank, size)))


def run(base: Path, name: str, *extra: str, size: int = 1) -> list[int]:
    (base / name).mkdir(exist_ok=True)
    (base / name / "rendezvous").unlink(missing_ok=True)
    return run_ranks(train_rank, size, base, name, extra, init=False)


def rows(base: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_is_promised(base):
    assert run(base, "whole") == [0]
    names = "config.resolved.yaml cmd.txt env.json metrics.jsonl events.jsonl logs summary.json ckpt".split()
    assert set(names) <= {path.name for path in (base / "whole").iterdir()}
    found = rows(base, "whole")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(set(PROMISED) <= row.keys() for row in found)
    assert all(row["useful_tokens_per_s"] <= row["padded_tokens_per_s"] for row in found)
    assert [row["step"] for row in found if "held_out_bits_per_byte" in row] == [3, 6]
    summary = json.loads((base / "whole" / "summary.json").read_text())
    assert summary["exit_code"] == 0 and summary["checkpoint"].endswith("step-00000006")


def test_the_resolved_config_trains_again_to_the_same_losses(base):
    from longctx.config.load import load

    run(base, "first")
    loaded = load([str(base / "first" / "config.resolved.yaml")])
    asked = make_config(base, "first", layout={"ulysses": 1})
    assert asked.model.vocab_size == "auto"  # the tokenizer has given it a size since
    assert loaded.config == replace(asked, model=replace(asked.model, vocab_size=320))


@pytest.mark.parametrize("size", [1, 2])
def test_divergence_names_step_documents_and_the_last_good_checkpoint(base, size):
    name = f"diverged-{size}"
    assert run(base, name, "train.lr=1e30", "train.warmup_steps=0", "checkpoint.every=1", size=size) == (
        [1] * size
    )
    events = [json.loads(line) for line in (base / name / "events.jsonl").read_text().splitlines()]
    message = events[-1]["error"]
    step = len(rows(base, name)) + 1
    assert re.match(
        rf"step {step}: loss .* and gradient norm (nan|inf); parameters were not updated", message
    )
    assert ".txt [0:" in message
    assert f"step-{step - 1:08d}" in message
    assert checkpoint.latest_good(base / name / "ckpt").name == f"step-{step - 1:08d}"


def test_wandb_runs_offline_under_one_id_and_resumes_it(base):
    run(base, "wandb", "metrics.wandb=offline", "train.steps=3")
    first = (base / "wandb" / "wandb_id").read_text()
    run(base, "wandb", "metrics.wandb=offline", "run.resume=true")
    assert (base / "wandb" / "wandb_id").read_text() == first
    folders = list((base / "wandb" / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(first) for folder in folders)


def test_metrics_log_every_writes_fewer_rows(base):
    run(base, "sparse", "metrics.log_every=4", "train.eval_every=0")
    assert [row["step"] for row in rows(base, "sparse")] == [4, 6]


def threads_rank(rank: int, size: int, base: Path) -> list[int]:
    from longctx.build import build
    from longctx.train.step import train_step

    counts = []
    for epoch in range(4):
        config = make_config(base, "threads", size=size, layout={"dp_shard": 2})
        run = build(config, make_world(base / "threads", rank, size, epoch=epoch))
        train_step(run, 1e-3)
        counts.append(len(os.listdir("/proc/self/task")))
        run.close()
        del run
    return counts


def test_threads_of_a_closed_run_end_when_the_next_is_built(base):
    (base / "threads").mkdir()
    for counts in run_ranks(threads_rank, 2, base, init=False):
        assert counts[1:] == counts[1:2] * 3


def deterministic_rank(rank: int, size: int, base: Path) -> list[bool]:
    """Whether torch refuses operations without fixed bits: before, during and after such a run."""
    import torch

    from longctx.build import build

    found = [torch.are_deterministic_algorithms_enabled()]
    for epoch, wanted in enumerate(("true", "false")):
        config = make_config(base, "fixed-flags", extra=(f"run.deterministic={wanted}",))
        built = build(config, make_world(base / "fixed-flags", rank, size, epoch=epoch))
        found.append(torch.are_deterministic_algorithms_enabled())
        built.close()
    return found


def test_deterministic_runs_have_the_same_bits_and_the_setting_ends_with_the_run(base):
    for name in ("fixed-1", "fixed-2"):
        assert run(base, name, "run.deterministic=true", "model.dropout=0.1", size=2) == [0, 0]
    first, second = (
        [(row["loss"], row["grad_norm"]) for row in rows(base, n)] for n in ("fixed-1", "fixed-2")
    )
    assert first == second
    (base / "fixed-flags").mkdir()
    assert run_ranks(deterministic_rank, 1, base, init=False) == [[False, True, False]]
