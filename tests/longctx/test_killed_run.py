"""The command line itself: a run killed at a random step and resumed repeats the uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import overrides, write_corpus

ROOT = Path(__file__).parents[2]
STEPS = 14
EXACT = ("step", "tokens", "loss", "grad_norm", "lr", "held_out_loss")


def command(base: Path, name: str, *extra: str) -> list[str]:
    options = [
        *overrides(base, name, layout={"ulysses": 2}),
        "run.processes=2",
        f"train.steps={STEPS}",
        "checkpoint.every=2",
        *extra,
    ]
    return [sys.executable, "-m", "longctx", "train", "recipes/quickstart.yaml", *options]


def start(base: Path, name: str, *extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(base, name, *extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(base: Path, name: str) -> list[dict]:
    path = base / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def exact(found: list[dict]) -> list[list]:
    return [[row.get(key) for key in EXACT] for row in found]


def worker_pids(process: subprocess.Popen) -> list[int]:
    """The ranks: grandchildren of the launcher."""

    def children(pid: int) -> list[int]:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return [worker for agent in children(process.pid) for worker in children(agent)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_corpus(folder / "docs")
    return folder


@pytest.mark.timeout(240)
def test_killed_at_a_random_step_and_resumed_is_bit_identical(base):
    whole = start(base, "whole")
    out, _ = whole.communicate(timeout=100)
    assert whole.returncode == 0, out
    kill_at = random.Random().randrange(3, STEPS - 1)
    killed = start(base, "killed")
    deadline = time.monotonic() + 60
    while len(rows(base, "killed")) < kill_at and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.005)
    os.kill(worker_pids(killed)[0], signal.SIGKILL)
    out, _ = killed.communicate(timeout=60)
    assert killed.returncode not in (0, 64), out
    refused = start(base, "killed")
    out, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "run.resume=true" in out
    resumed = start(base, "killed", "run.resume=true")
    out, _ = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, out
    assert "resumed" in out
    assert exact(rows(base, "killed")) == exact(rows(base, "whole")), f"killed at step {kill_at}"


@pytest.mark.timeout(240)
def test_a_signal_finishes_the_step_saves_and_exits_64(base):
    process = start(base, "stopped", "train.steps=100000")
    deadline = time.monotonic() + 60
    while len(rows(base, "stopped")) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 64, out
    last = rows(base, "stopped")[-1]["step"]
    assert (base / "stopped" / "ckpt" / f"step-{last:08d}" / "manifest.json").exists()
    assert "run.resume=true" in out
