"""Training runs in which faults strike, and the undisturbed runs that they must equal."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ranks import run_ranks
from tiny import make_config, overrides, write_corpus

ROOT = Path(__file__).parents[2]
EXACT = ("step", "tokens", "loss", "grad_norm", "lr", "held_out_loss")
STEPS = 34
SIZE = 4
PLANNED = ("step_plan.groups=adaptive", "curriculum.kind=natural", "data.min_len=64")
LAYOUTS = {
    "fsdp4": ({"dp_shard": 4}, ()),
    "fsdp2-ring2": ({"dp_shard": 2, "ring": 2}, ()),
    "hsdp2x2": ({"dp_replicate": 2, "dp_shard": 2}, ("recovery.compare_every=5",)),
    "pp2-fsdp2": ({"dp_shard": 2}, ("parallel.pp=2",)),
    "pp4": ({}, ("parallel.pp=4", "model.num_layers=4")),
    "planned4": ({"dp_shard": 4}, PLANNED),
}
COMMON = (
    f"train.steps={STEPS}",
    "train.global_batch_tokens=4096",
    "train.eval_every=0",
    "checkpoint.every=0",
    "recovery.spares=1",
    "recovery.heartbeat_s=3",
    "recovery.connect_s=20",
)


def undisturbed(rank, size, base, name, layout, extra):
    """Train without faults and without replication, on ranks of the test's own."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from longctx.build import World
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    config = make_config(base, name, size=size, layout=layout, extra=(*COMMON, *extra))
    path = str(base / f"{name}.store")
    store = dist.FileStore(path, size)
    store.set_timeout(timedelta(seconds=60))
    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store)
    return train(config, Fixed(world))


def reference(base: Path, layout: str, *extra: str) -> Path:
    """Run folder of the undisturbed run of a layout."""
    if not (base / "docs").exists():
        write_corpus(base / "docs")
    degrees, own = LAYOUTS[layout]
    name = f"{layout}-reference"
    assert set(run_ranks(undisturbed, SIZE, base, name, degrees, (*own, *extra), init=False)) == {0}
    return base / name


def rehearse(base: Path, layout: str, strikes, *extra: str, name: str = "rehearsal", timeout=170):
    """Run `longctx chaos`; returns its exit code, its words, and the run folder."""
    degrees, own = LAYOUTS[layout]
    options = [f"--strike={strike}" for strike in strikes]
    values = [*overrides(base, name, layout=degrees), *COMMON, *own, *extra, f"run.processes={SIZE}"]
    code, words = run_whole(
        [sys.executable, "-m", "longctx", "chaos", "recipes/quickstart.yaml", *values, *options], timeout
    )
    return code, words, base / name


def run_whole(command: list[str], timeout: float) -> tuple[int, str]:
    """Exit code and words of a command; on a timeout its whole session is killed, and its words are told."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        words, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        words, _ = process.communicate(timeout=30)
        raise AssertionError(f"no end within {timeout} s; its words:\n{words}") from None
    return process.returncode, words


def rows(folder: Path) -> list[list]:
    """What a run's steps computed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(key) for key in EXACT] for row in lines]


def events(folder: Path, kind: str) -> list[dict]:
    """Events of one kind."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


def state(folder: Path) -> dict[str, str]:
    """Hash of every tensor file of the last checkpoint: parameters and moments."""
    last = max((folder / "ckpt").glob("step-*"))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(last.glob("*.safetensors"))
    }


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def left_over(folder: Path) -> list[str]:
    """Command lines of living processes that belong to a run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"run.dir={folder}" in words and int(pid) != os.getpid():
            found.append(" ".join(words))
    return found


def assert_survivors_stayed(folder: Path) -> None:
    """The process ids of ranks that were not lost are those of before."""
    before = None
    for event in events(folder, "recovered"):
        gone = {loss["rank"] for loss in event["lost"] if not loss["alive"]}
        changed = {rank for rank in range(SIZE) if before and before[rank] != event["pids"][rank]}
        assert changed <= gone, event
        before = event["pids"]
