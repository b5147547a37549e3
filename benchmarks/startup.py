"""How long a person waits: `longctx --help`, and `longctx train` until the first step is done.

Goals on 2 cores with warm file caches and a prepared corpus: help < 0.25 s, first step < 12 s.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

LONGCTX = [sys.executable, "-m", "longctx"]


def help_seconds() -> float:
    """Wall time of `longctx --help`."""
    start = time.perf_counter()
    subprocess.run([*LONGCTX, "--help"], capture_output=True, check=True)
    return time.perf_counter() - start


def first_step_seconds(base: Path, name: str) -> tuple[float, float]:
    """Seconds from the command to the first row of metrics.jsonl, and that step's own time."""
    overrides = [f"run.dir={base / name}", "train.steps=1000", "run.device=cpu", "run.processes=2"]
    rows = base / name / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        [*LONGCTX, "train", "recipes/quickstart.yaml", *overrides],
        cwd=harness.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while not (rows.exists() and rows.read_text().endswith("\n")):
            if process.poll() is not None:
                raise RuntimeError(f"train ended with {process.returncode}: {process.stderr.read().decode()}")
            if time.perf_counter() - start > 120:
                raise TimeoutError("no first step within 120 s")
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        return seconds, json.loads(rows.read_text().splitlines()[0])["step_time_s"]
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Two interrupts: the first asks to save, the second ends at once."""
    for _ in range(2):
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.5)
    process.wait(timeout=60)


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    rounds = 1 if args.quick else 5
    helps = [help_seconds() for _ in range(rounds + 1)][1:]
    with tempfile.TemporaryDirectory() as folder:
        starts = [first_step_seconds(Path(folder), f"run{i}") for i in range(rounds + 1)][1:]
    figures = {
        "help_s": harness.Figure(harness.median(helps), "s", "median; goal < 0.25"),
        "first_step_s": harness.Figure(harness.median([s for s, _ in starts]), "s", "median; goal < 12"),
        "of_which_step_s": harness.Figure(
            harness.median([s for _, s in starts]), "s", "the first step itself"
        ),
    }
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
