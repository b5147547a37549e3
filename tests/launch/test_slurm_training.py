"""Training through `longctx launch slurm` on a real Slurm: stopped, lost, resumed, the same bits."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import make_config, make_world, overrides, write_corpus

from launch import hang as hanging
from launch.__main__ import main
from launch.outcome import rank_log

ROOT = Path(__file__).parents[2]
LAYOUT = {"dp_shard": 2, "ulysses": 1}
SITE = "checks: {disk: 1MiB, shm: 1MiB}\nnetwork: {interface: lo}\nenv: {OMP_NUM_THREADS: '1'}\n"
EXTRA = ("train.eval_every=0", "data.held_out=0")


def train_rank(rank, size, base, steps):
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    config = make_config(base, "whole", size=size, layout=LAYOUT, extra=(*EXTRA, f"train.steps={steps}"))
    return train(config, Fixed(make_world(base, rank, size)))


@pytest.fixture
def launch(slurm, tmp_path):
    """Submit the tiny training run on two nodes without waiting for it; returns its job id."""
    site = tmp_path / "site.yaml"
    site.write_text(SITE)
    write_corpus(tmp_path / "docs")

    def submit(*extra, options=()):
        command = [sys.executable, "-m", "longctx", "launch", "slurm", "quickstart"]
        command += [f"--site={site}", "--set=nodes=2", "--no-follow", *options]
        values = [*overrides(tmp_path, layout=LAYOUT), *EXTRA, *extra]
        env = {**os.environ, **slurm.env}
        done = subprocess.run([*command, *values], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "run" / "launch" / "job.json").read_text())["ids"][0]

    return submit


def rows(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def said(folder):
    return "".join(path.read_text() for path in sorted(folder.glob("launch/*.log")))


@contextmanager
def meanwhile(function, *args, **options):
    """A call in another thread: the uninterrupted run, while Slurm holds the other one back."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *args, **options)


def check_equal(run, whole, steps):
    """Every figure that does not measure time, and every byte of the last checkpoint's tensors."""
    names = ("step", "tokens", "loss", "grad_norm", "lr")
    ours, theirs = ([[row[name] for name in names] for row in rows(each)] for each in (run, whole))
    assert len(theirs) == steps and ours == theirs
    for rank in (0, 1):
        name = f"ckpt/step-{steps:08d}/rank-{rank}.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.timeout(240)
def test_usr1_saves_requeues_and_the_resumed_run_is_the_same_run(slurm, launch, tmp_path):
    job_id, run = launch("train.steps=40", "metrics.wandb=offline", "recovery.mode=off"), tmp_path / "run"
    slurm.wait(lambda: len(rows(run)) >= 3, 120)
    slurm.run("scancel", "--signal=USR1", job_id)
    with meanwhile(run_ranks, train_rank, 2, tmp_path, 40, init=False) as whole:
        slurm.wait(lambda: slurm.restarted(job_id), 60)
        slurm.wait(lambda: slurm.job(job_id)["JobState"] in ("COMPLETED", "FAILED"), 120)
        assert slurm.job(job_id)["JobState"] == "COMPLETED", said(run)
    assert whole.result() == [0, 0]
    stopped = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in stopped]
    assert kinds.count("start") == 2 and kinds.count("stop") == 1
    assert stopped[kinds.index("stop")]["signal"] == "SIGUSR1"
    check_equal(run, tmp_path / "whole", 40)
    identity = (run / "wandb_id").read_text().strip()
    assert len(list((run / "wandb").glob(f"offline-run-*-{identity}"))) == 2
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_node_requeues_and_the_run_goes_on_as_one(slurm, launch, tmp_path, monkeypatch, capsys):
    steps = 900  # more than a fast machine does until Slurm misses the node
    job_id = launch(f"train.steps={steps}", "checkpoint.every=5", options=["--set=nodes=2"])
    run = tmp_path / "run"
    slurm.wait(lambda: len(rows(run)) >= 7, 120)
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    assert main(["hang", str(run), "--world=2"]) == 0
    places = capsys.readouterr().out.splitlines()
    assert places[0].startswith("rank 0: ") and ".py:" in places[1]
    calls = hanging.calls(run, 2)
    assert set(calls) == {0, 1} and any(call.ranks == (0, 1) and call.number > 7 for call in calls[1])
    node = (run / "launch" / f"{job_id}.0" / "hosts").read_text().split()[1]
    slurm.kill_node(node)
    slurm.wait(lambda: slurm.job(job_id)["JobState"] != "RUNNING", 60)
    slurm.start_node(node)
    with meanwhile(run_ranks, train_rank, 2, tmp_path, steps, init=False, timeout=300) as whole:
        slurm.wait(lambda: slurm.restarted(job_id), 60)
        slurm.wait(lambda: slurm.job(job_id)["JobState"] in ("COMPLETED", "FAILED"), 200)
        assert slurm.job(job_id)["JobState"] == "COMPLETED", said(run)
    assert whole.result() == [0, 0]
    check_equal(run, tmp_path / "whole", steps)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_fails_is_named_with_its_node_and_traceback(slurm, launch, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "docs" / "bad.txt").write_bytes(b"\xff\xfe")
    job_id = launch("train.lr=1e30", "train.steps=50")
    slurm.wait(lambda: slurm.job(job_id)["JobState"] in ("COMPLETED", "FAILED"), 150)
    text = said(run)
    assert slurm.job(job_id)["ExitCode"] == "1:0"
    assert "failed first" in text and "on n" in text and "ChildFailedError" not in text
    assert rank_log(run / "launch" / f"{job_id}.0", 1, 1, "stderr.log") is not None
