"""`longctx train` and `longctx verify` whole: front process, launcher, torchrun, two workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 50
SMALL = [
    "model.num_layers=1", "model.hidden_size=32", "model.ffn_size=64", "model.head_dim=8", "data.seq_len=256",
    "train.global_batch_tokens=256", "train.warmup_steps=1", "train.eval_tokens=256", "train.eval_every=0",
    "checkpoint.every=0", "data.workers=1", "data.held_out=0.2",
]  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Start `longctx VERB quickstart ...` on a small folder of documents; ended afterwards."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number} says its number. " * 20)
    where = [f"data.path={folder}", f"data.cache_dir={tmp_path}/cache", f"run.dir={tmp_path}/run"]
    started = []

    def start(verb, *overrides):
        process = subprocess.Popen(
            [sys.executable, "-m", "longctx", verb, "quickstart", *SMALL, *where, *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def steps(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_share_the_sequence_and_the_run_ends_well(start, tmp_path):
    code, out, err = end(start("train", "train.steps=2"))
    assert code == 0, err
    assert "ulysses 2" in out
    assert steps(tmp_path) == [1, 2]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 0


@pytest.mark.timeout(150)  # two runs, each with its launcher, torchrun, supervisors and trainers
def test_a_signal_ends_with_64_and_the_run_goes_on_from_there(start, tmp_path):
    process = start("train", "train.steps=100000")
    deadline = time.monotonic() + PATIENCE_S
    while len(steps(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 64, err
    assert "Traceback" not in err and "ChildFailedError" not in err
    reached = steps(tmp_path)[-1]
    code, _, err = end(start("train", f"train.steps={reached + 1}", "run.resume=true"))
    assert code == 0, err
    assert steps(tmp_path)[-1] == reached + 1


def test_the_folder_of_a_run_at_work_is_left_alone(start, tmp_path):
    folder = tmp_path / "run"
    first = start("train", "run.processes=1", "train.steps=100000")
    until = time.monotonic() + PATIENCE_S
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.1)
    second = start("train", "run.processes=1", "run.resume=true")
    _, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2 and "belongs to a run that is at work (process" in errors
    assert not (folder / "status.json").exists() and first.poll() is None
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=PATIENCE_S) == 64
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 64


def test_verify_ends_with_0(start):
    code, out, err = end(start("verify", "--dtype=float64"))
    assert code == 0, err
    assert "equal" in out
