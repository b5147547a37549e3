"""What a lost rank costs, and what being able to lose one costs.

Kills: one run of four gloo processes whose ranks are killed with SIGKILL at seeded random steps, ranks,
phases and moments; a spare is warm again before most of them, and those where it is not are timed apart.
The same run undisturbed is the oracle: every line of metrics.jsonl and every byte of the last checkpoint.
Seconds to resume are counted from the kill itself to the moment when all ranks hold the state again and
compute. Goals: no committed step lost; p50 <= 1.0 s and p95 <= 2.0 s with a warm spare.

Restart: the same loss without recovery, torchrun --max-restarts with a checkpoint every 4 steps, from
the kill to the first step that was not done before. torchft: see `_recovery_torchft.py`.

Overhead: steps with a generation kept every k steps against steps without, in turns in one process
group, for a tiny model and for the largest that two cores train in about a second a step. Goal <= 3% at k=4.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Figure, median

sys.path.insert(0, str(harness.ROOT / "tests" / "support"))

import _recovery_torchft
from ranks import run_ranks
from rehearsal import children, events, rows, state
from tiny import make_config, overrides, write_corpus

from longctx.recovery.faults import Fault, write_plan

SIZE = 4
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "keep", "replicate")
RUN = (
    "train.global_batch_tokens=2048",
    "train.eval_every=0",
    "train.eval_tokens=1024",
    "recovery.spares=1",
    "metrics.log_every=1",
)
MODELS = {
    "tiny": (),
    "large": (
        "model.num_layers=4",
        "model.hidden_size=384",
        "model.ffn_size=1152",
        "model.num_heads=6",
        "model.num_kv_heads=2",
        "model.head_dim=64",
    ),
}
EVERY = (1, 4, 16)
BLOCK = max(EVERY)
"""Steps of a turn of the overhead, with and without generations."""


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--kills", type=int, default=50, help="random kills")
    flags.add_argument(
        "--spacing", type=int, default=60, help="steps between kills: time for a spare to warm"
    )
    flags.add_argument("--rounds", type=int, default=10, help="turns of the overhead")
    flags.add_argument("--repeats", type=int, default=3, help="kills of each peer")
    args = flags.parse_args()
    kills, spacing = (1, 40) if args.quick else (args.kills, args.spacing)
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        base = Path(folder)
        write_corpus(base / "docs", documents=400)
        peers = restarted(base, 0 if args.quick else args.repeats)
        peers |= _recovery_torchft.figures(1 if args.quick else args.repeats)
        figures = killed(base, kills, spacing, args.seed)
        figures |= overhead(
            base, rounds=2 if args.quick else args.rounds, models=["tiny"] if args.quick else list(MODELS)
        )
    harness.report(__file__, figures | peers, args)


def killed(base: Path, kills: int, spacing: int, seed: int) -> dict[str, Figure]:
    """A run with random kills against the run without."""
    chooser = random.Random(seed)
    steps = spacing * (kills + 1)
    faults = [
        Fault(
            step=spacing * (index + 1) + chooser.randrange(-spacing // 4, spacing // 4),
            rank=chooser.randrange(SIZE),
            phase=PHASES[index % len(PHASES)],
            after_s=chooser.choice((0.0, chooser.random() * 0.03)),
        )
        for index in range(kills)
    ]
    train(base, "undisturbed", f"train.steps={steps}")
    write_plan(faults, base / "killed" / "chaos" / "plan.json")
    train(base, "killed", f"train.steps={steps}", verb="chaos", options=("--yes",))
    plain, hurt = base / "undisturbed", base / "killed"
    struck = [json.loads(path.read_text()) for path in (hurt / "chaos").glob("struck-*.json")]
    recoveries = events(hurt, "recovered")
    warm, cold = [], []
    for event in recoveries:
        times = [mark["time"] for mark in struck if mark["rank"] in {each["rank"] for each in event["lost"]}]
        began = max(t for t in times if t <= event["time"])
        (warm if all(each["warm"] for each in event["lost"]) else cold).append(event["time"] - began)
    redone = [event["steps_redone"] for event in recoveries]
    lost = sum(a != b for a, b in zip(rows(plain), rows(hurt), strict=True)) + len(events(hurt, "mismatch"))
    phases = ", ".join(sorted({fault.phase for fault in faults}))
    parts = {
        name: median_of(recoveries, name)
        for name in ("detect_s", "fence_s", "join_s", "form_s", "transfer_s")
    }
    return {
        "kills": Figure(len(struck), "count", f"of {kills} planned; {len(recoveries)} recoveries"),
        "kills_cold": Figure(len(cold), "count", "the next spare was not warm yet; timed apart"),
        "committed_steps_lost": Figure(
            lost, "count", "lines of metrics.jsonl unlike the undisturbed run's; goal 0"
        ),
        "state_identical": Figure(
            float(state(plain) == state(hurt)), "count", "1: every byte of the last checkpoint"
        ),
        "steps_redone_p95": Figure(percentile(redone, 95), "count"),
        "resume_s_p50": Figure(percentile(warm, 50), "s", "warm spare, from the kill; goal <= 1.0"),
        "resume_s_p95": Figure(percentile(warm, 95), "s", "warm spare, from the kill; goal <= 2.0"),
        "resume_cold_s_p50": Figure(percentile(cold, 50), "s", "a process that has to import torch first"),
        "phases": Figure(len(PHASES), "count", phases),
        **{
            f"{name.removesuffix('_s')}_s_p50": Figure(value, "s", "part of it, on rank 0")
            for name, value in parts.items()
        },
    }


def train(base: Path, name: str, *extra: str, verb: str = "train", options: Sequence[str] = ()) -> None:
    """One run under torchrun, as users start it."""
    values = [*overrides(base, name, layout={"dp_shard": SIZE}), *RUN, *extra]
    line = ["--nnodes=1", f"--nproc-per-node={SIZE}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    line += ["--rdzv-conf=is_host=true", "--local-addr=127.0.0.1", "--max-restarts=1", "-m", "longctx", verb]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *line,
        "recipes/quickstart.yaml",
        *options,
        *values,
    ]
    done = subprocess.run(
        command, cwd=harness.ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])


def environment() -> dict[str, str]:
    """One thread per process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(harness.ROOT)}


def restarted(base: Path, times: int) -> dict[str, Figure]:
    """The same loss with torchrun's restart of everything and a checkpoint."""
    seconds = []
    for index in range(times):
        name = f"restarted-{index}"
        extra = ("recovery.mode=off", "checkpoint.every=4", "train.steps=24", "run.resume=true")
        values = [*overrides(base, name, layout={"dp_shard": SIZE}), *RUN, *extra]
        folder = base / name
        line = [
            "--nnodes=1",
            f"--nproc-per-node={SIZE}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
        ]
        line += [
            "--rdzv-conf=is_host=true",
            "--local-addr=127.0.0.1",
            "--max-restarts=1",
            "-m",
            "longctx",
            "train",
        ]
        run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *line, "recipes/quickstart.yaml", *values],
            cwd=harness.ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        done = wait_for_step(run, folder, 13)
        victim = max(children(run.pid))
        os.kill(victim, 9)
        killed_at = time.time()
        wait_for_step(run, folder, done + 1)
        seconds.append(time.time() - killed_at)
        run.wait()
    return {
        "restart_s": Figure(
            median(seconds) if seconds else None,
            "s",
            "torchrun restarts all ranks, newest checkpoint (every 4 steps)",
        )
    }


def wait_for_step(run: "subprocess.Popen[bytes]", folder: Path, step: int) -> int:
    """Poll metrics.jsonl until it has a step; returns the newest."""
    path = folder / "metrics.jsonl"
    while True:
        ended = run.poll()
        lines = path.read_text().splitlines() if path.exists() else []
        found = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
        if found >= step:
            return found
        if ended is not None:
            raise RuntimeError(f"the run in {folder} ended with {ended} after step {found}")
        time.sleep(0.005)


def overhead(base: Path, *, rounds: int, models: Sequence[str]) -> dict[str, Figure]:
    """Step time with generations every k steps over step time without, in turns."""
    figures = {}
    for name in models:
        turns = rounds * (4 if name == "tiny" else 1)  # of seconds, in which the scheduler shows
        found = run_ranks(_steps, 2, base, name, MODELS[name], turns, init=False, timeout=900.0)[0]
        plain, kept = found["off"], {k: found[str(k)] for k in EVERY}
        figures[f"{name}_step_ms"] = Figure(
            1e3 * median(plain), "ms", f"{found['mib']:.1f} MiB of state per rank, 2 ranks"
        )
        for k, values in kept.items():
            shares = sorted(100 * (kept / off - 1) for kept, off in zip(values, plain, strict=True))
            low, high = percentile(shares, 25), percentile(shares, 75)
            note = f"a generation every {k} steps; quartiles {low:.1f} to {high:.1f}"
            figures[f"{name}_overhead_percent_k{k}"] = Figure(
                median(shares), "%", note + ("; goal <= 3" if k == 4 else "")
            )
    figures["overhead_percent"] = figures[f"{models[-1]}_overhead_percent_k4"]
    return figures


def _steps(rank: int, size: int, base: Path, name: str, extra: Sequence[str], rounds: int) -> dict[str, Any]:
    """On each rank: blocks of steps with a generation every k and with none, in turns."""
    import torch
    import torch.distributed as dist

    from longctx.build import World, build
    from longctx.checkpoint.shares import run_tensors
    from longctx.recovery.generations import State
    from longctx.recovery.keeper import Keeper
    from longctx.recovery.replicate import Memory, Replication
    from longctx.train.schedule import learning_rate
    from longctx.train.step import train_step
    from parallel import comm

    config = make_config(base, f"overhead-{name}", size=size, layout={"dp_shard": size}, extra=(*RUN, *extra))
    world = World(
        rank=rank,
        size=size,
        device=torch.device("cpu"),
        store=dist.FileStore(str(base / f"{name}.store"), size),
    )
    run = build(config, world)
    memory = Memory()
    replication, keeper = Replication(memory, run.mesh.host_group(), (1,)), Keeper(memory.own)
    seconds: dict[str, list[float]] = {"off": [], **{str(k): [] for k in EVERY}}
    modes = list(seconds)
    for number in range(rounds + 1):
        for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:  # each is first in its turn
            began = time.perf_counter()
            for step in range(BLOCK):
                run.progress.step = step % 4  # the same batches in every block
                train_step(run, learning_rate(0, run.config.train))
                behind = torch.tensor([float(not replication.complete)])  # goes with the step's figures
                behind = comm.all_reduce(behind, group=run.mesh.group("world"), op="max")
                if mode != "off" and step % int(mode) == 0:
                    assert not behind, "generations take longer than steps: this would measure fewer of them"
                    replication.send(keeper.pack(run, {}))
            replication.wait()
            dist.barrier()
            if number:
                seconds[mode].append((time.perf_counter() - began) / BLOCK)
    mib = State(run_tensors(run)).num_bytes / 2**20
    replication.close()
    run.close()
    return seconds | {"mib": mib}


def median_of(recoveries: Sequence[dict[str, Any]], name: str) -> float | None:
    """Median of a figure over the events that have it."""
    values = [event[name] for event in recoveries if event[name] is not None]
    return median(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] if ordered else None


if __name__ == "__main__":
    main()
