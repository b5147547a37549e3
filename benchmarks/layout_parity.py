"""The quickstart recipe in five layouts: how far losses drift from one process.

Each layout is trained by the command line itself, on CPU processes: 30 steps in float32 at
lr 3e-4 (goal: largest relative loss difference <= 1e-5) and 10 steps in float64 (<= 1e-10).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

LAYOUTS = {
    "one": {},
    "ulysses2": {"ulysses": 2},
    "ring2": {"ring": 2},
    "ulysses2_ring2": {"ulysses": 2, "ring": 2},
    "shard2_ring2": {"dp_shard": 2, "ring": 2},
}
STEPS = {"float32": 30, "float64": 10}
GOALS = {"float32": "goal <= 1e-5", "float64": "goal <= 1e-10"}


def losses(folder: Path, degrees: dict[str, int], options: list[str]) -> list[float]:
    """Train one layout with `longctx train`; its loss of every step, held-out losses last."""
    every = {"dp_shard": 1, "ring": 1, "ulysses": 1} | degrees
    processes = every["dp_shard"] * every["ring"] * every["ulysses"]
    overrides = [f"parallel.{axis}={degree}" for axis, degree in every.items()]
    overrides += [f"run.dir={folder}", f"run.processes={processes}", "run.device=cpu", *options]
    command = [sys.executable, "-m", "longctx", "train", "recipes/quickstart.yaml", *overrides]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows] + [row["held_out_loss"] for row in rows if "held_out_loss" in row]


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    options = ["train.lr=3e-4", f"run.seed={args.seed}", "train.eval_tokens=8k", "data.seq_len=4k"]
    options += ["train.global_batch_tokens=8k", "train.microbatch_tokens=4k"]
    if args.quick:
        options += ["data.seq_len=512", "train.global_batch_tokens=1k", "train.microbatch_tokens=512"]
    figures = {}
    with tempfile.TemporaryDirectory() as base:
        for dtype, steps in STEPS.items():
            steps = 2 if args.quick else steps
            chosen = [*options, f"train.dtype={dtype}", f"train.steps={steps}"]
            layouts = list(LAYOUTS)[: 2 if args.quick else None]
            found = {name: losses(Path(base, f"{name}-{dtype}"), LAYOUTS[name], chosen) for name in layouts}
            for name in layouts[1:]:
                pairs = zip(found[name], found["one"], strict=True)
                worst = max(abs(a - b) / abs(b) for a, b in pairs)
                figures[f"{dtype}_{name}"] = harness.Figure(worst, "ratio", f"{steps} steps; {GOALS[dtype]}")
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
