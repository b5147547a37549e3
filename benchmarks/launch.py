"""What launching costs: rendering, the way to the first step, preemption and node loss on a real Slurm.

`launch_start.py` measures the start of many nodes.

Render: `launch slurm --dry-run` as a process, with Python's own start. Goal < 0.3 s.
First step: `longctx launch local` of the tiny recipe on two processes, to the first line of metrics.jsonl.
Slurm (tests/support/slurm_cluster.py, three nodes on this machine): seconds from `scancel --signal=USR1`, and
from `kill -9` of a slurmd, to the first step of the resumed run; Slurm's own share (the hold after a requeue,
the time to notice a lost node) is told apart.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import Figure, median

sys.path.insert(0, str(harness.ROOT / "tests" / "support"))

import slurm_cluster
from tiny import overrides, write_corpus

LAYOUT = {"dp_shard": 2}
RUN = (
    "train.steps=400",
    "train.eval_every=0",
    "data.held_out=0",
    "checkpoint.every=5",
    "metrics.log_every=1",
)
SITE = "checks: {disk: 1MiB, shm: 1MiB}\nnetwork: {interface: lo}\nenv: {OMP_NUM_THREADS: '1'}\n"


def python(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run our Python in the repository."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True, **options)


def render(rounds: int) -> dict[str, Figure]:
    """Rendering as a process."""
    words = ["-m", "launch", "slurm", "--site=slurm", "--set=nodes=64", "--dry-run", "--", "-m", "longctx"]
    seconds = harness.in_turns(
        {"render": lambda: python(*words), "bare": lambda: python("-c", "")}, rounds=rounds
    )
    return {
        "render_s": Figure(median(seconds["render"]), "s", "python -m launch slurm --dry-run; goal < 0.3"),
        "python_start_s": Figure(median(seconds["bare"]), "s", "of it, an empty Python"),
    }


def first_step(base: Path) -> dict[str, Figure]:
    """From the command to the first line of metrics, data prepared before."""
    python("-m", "longctx", "prepare", "quickstart", *overrides(base, layout=LAYOUT))
    values = [*overrides(base, "local", layout=LAYOUT), *RUN, "train.steps=3"]
    begin = time.perf_counter()
    command = [sys.executable, "-m", "longctx", "launch", "local", "quickstart", *values, "run.processes=2"]
    run = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while rows(base / "local") < 1:
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    run.wait(timeout=120)
    return {"local_first_step_s": Figure(seconds, "s", "longctx launch local, two processes")}


def rows(folder: Path) -> int:
    """Steps that metrics.jsonl holds."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


class Job:
    """A training job on the cluster."""

    def __init__(self, cluster: slurm_cluster.Cluster, base: Path, name: str) -> None:
        self.cluster, self.run = cluster, base / name
        (base / "site.yaml").write_text(SITE)
        options = [f"--site={base}/site.yaml", "--set=nodes=2", "--no-follow"]
        words = ["-m", "longctx", "launch", "slurm", "quickstart", *options]
        env = {**os.environ, **cluster.env}
        python(*words, *overrides(base, name, layout=LAYOUT), *RUN, env=env)
        self.id = str(json.loads((self.run / "launch" / "job.json").read_text())["ids"][0])
        cluster.wait(lambda: rows(self.run) >= 7, 150)

    def state(self) -> str:
        """Slurm's word for it."""
        return self.cluster.job(self.id)["JobState"]

    def starts(self) -> int:
        """Times that the training program has begun."""
        return (self.run / "events.jsonl").read_text().count('"kind": "start"')

    def resumed(self) -> float:
        """Seconds from now, the job being in the queue again, to its first new step."""
        begin = time.perf_counter()
        self.cluster.wait(lambda: self.starts() >= 2, 150)
        done = rows(self.run)
        self.cluster.wait(lambda: rows(self.run) > done, 60)
        seconds = time.perf_counter() - begin
        self.cluster.run("scancel", self.id)
        return seconds


def preemption(cluster: slurm_cluster.Cluster, base: Path) -> dict[str, Figure]:
    """USR1, save, 64, requeue, resumed step."""
    job = Job(cluster, base, "preempted")
    begin = time.perf_counter()
    cluster.run("scancel", "--signal=USR1", job.id)
    cluster.wait(lambda: job.state() == "PENDING", 60)
    saved = time.perf_counter() - begin
    cluster.wait(lambda: cluster.restarted(job.id), 60)
    held = time.perf_counter() - begin - saved
    seconds = saved + job.resumed()
    return {
        "preempted_to_queue_s": Figure(saved, "s", "USR1 to the job back in the queue, saved"),
        "preempted_to_step_s": Figure(seconds, "s", "USR1 to the resumed run's step, without Slurm's hold"),
        "preempted_hold_s": Figure(held, "s", "Slurm's hold, cut short; 121 s where nobody does"),
    }


def node_loss(cluster: slurm_cluster.Cluster, base: Path) -> dict[str, Figure]:
    """Kill -9 of a slurmd, requeue by Slurm, resumed step."""
    job = Job(cluster, base, "lost")
    node = (job.run / "launch" / f"{job.id}.0" / "hosts").read_text().split()[1]
    begin = time.perf_counter()
    cluster.kill_node(node)
    cluster.wait(lambda: job.state() != "RUNNING", 90)
    noticed = time.perf_counter() - begin
    cluster.start_node(node)
    cluster.wait(lambda: cluster.restarted(job.id), 60)
    return {
        "lost_noticed_s": Figure(noticed, "s", "kill -9 of a slurmd to Slurm's notice (SlurmdTimeout=5)"),
        "lost_to_step_s": Figure(job.resumed(), "s", "the restart by Slurm to the resumed run's step"),
    }


def slurm(base: Path, *, quick: bool) -> dict[str, Figure]:
    """Both on one cluster."""
    names = ("preempted_to_step_s", "lost_to_step_s")
    reason = "with --quick not measured" if quick else slurm_cluster.missing()
    if reason:
        return {name: Figure(None, "s", reason) for name in names}
    cluster = slurm_cluster.Cluster(base / "cluster")
    try:
        cluster.start()
        return preemption(cluster, base) | node_loss(cluster, base)
    finally:
        cluster.stop()


def main() -> None:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="launch-bench-") as folder:
        base = Path(folder)
        base.chmod(0o755)
        write_corpus(base / "docs")
        figures = render(1 if args.quick else 7) | first_step(base) | slurm(base, quick=args.quick)
    harness.report(__file__, figures, args)


if __name__ == "__main__":
    main()
