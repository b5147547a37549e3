"""Batch scripts to Slurm, and the word back."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import exclusion
from .errors import LaunchError, PreflightError, SpecError
from .preflight import versions
from .spec import Job

SCRIPT, RECORD = "launch/job.sbatch", "launch/job.json"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
POLL_S = 1.0
SILENCE_S = 60.0
"""A controller that restarts, or is busy, does not answer for a while."""


def submit(job: Job, script: str) -> list[str]:
    """Write the script, hand it to sbatch, record the ids; one id for each link of a chain.

    Raises:
        PreflightError: no sbatch here.
        SpecError: sbatch refused the script, with its words.
    """
    check_sbatch()
    path = Path(job.folder, SCRIPT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    exclusion.forget(Path(job.folder))
    links = job.restart.links if job.restart.mode == "chain" else 1
    ids = [_sbatch(path, {"LAUNCH_LINK": str(link)} if links > 1 else {}) for link in range(links)]
    content = {"backend": "slurm", "ids": ids, "processes": job.processes, "versions": versions()}
    record(Path(job.folder), content)
    return ids


def check_sbatch() -> None:
    """Refuse a machine from which nothing can be submitted.

    Raises:
        PreflightError: no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise PreflightError("sbatch is not on PATH: submit from a login node, or use --dry-run")


def record(folder: Path, content: dict[str, Any]) -> None:
    """What status, logs, requeue and cancel find the job by."""
    path = folder / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def recorded(folder: Path) -> dict[str, Any]:
    """The job that was started for a run folder.

    Raises:
        SpecError: there is none.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{folder} holds no launched job ({RECORD}); name the run folder of a launch"
        ) from error
    return dict(content)


def _sbatch(path: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise SpecError(
            f"sbatch refused the job: {done.stderr.strip()}; remove a directive that the site does not take "
            "with --no-directive NAME, or set another with --directive NAME=VALUE"
        )
    return done.stdout.strip().partition(";")[0]


def scontrol(arguments: Sequence[str]) -> str:
    """Output of scontrol.

    Raises:
        LaunchError: its own words.
    """
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise PreflightError(f"scontrol cannot be run: {error}") from error
    if done.returncode:
        raise LaunchError(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def states(job_id: str) -> list[dict[str, str]]:
    """What Slurm says about a job: one entry, several for arrays and heterogeneous jobs."""
    text = scontrol(["show", "job", job_id, "--oneliner"])
    return [dict(word.partition("=")[::2] for word in line.split()) for line in text.splitlines() if line]


def follow(job_id: str, folder: Path) -> int:
    """Print a job's logs as they grow until the job has ended; its exit code. Ctrl-C leaves it running.

    Args:
        job_id: of a job or an array; the tasks of an array follow each other.
        folder: with the logs, one for each task.

    Raises:
        LaunchError: Slurm has not answered for a minute.
    """
    positions: dict[Path, int] = {}
    silent = 0
    while True:
        try:
            found, silent = states(job_id), 0
        except LaunchError:
            silent += 1
            if silent * POLL_S > SILENCE_S:
                raise
            found = []
        for log in [*folder.glob(f"{job_id}.log"), *sorted(folder.glob(f"{job_id}_*.log"))]:
            positions[log] = show_new(log, positions.get(log, 0))
        if found and all(state["JobState"].split("+")[0] in ENDED for state in found):
            return _exit_code(max(found, key=_task))
        time.sleep(POLL_S)


def _task(state: Mapping[str, str]) -> int:
    """Index of an array's task; tasks that never began are told as one, such as `1-3`."""
    return int(re.split(r"\D", state.get("ArrayTaskId", "0"))[0] or 0)


def _exit_code(state: Mapping[str, str]) -> int:
    code, _, number = state.get("ExitCode", "0:0").partition(":")
    return int(code) or (128 + int(number) if int(number) else int(state["JobState"] != "COMPLETED"))


def show_new(log: Path, position: int) -> int:
    """Print what a file holds behind a position; the new position."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        content = file.read()
    print(content.decode(errors="replace"), end="", flush=True)
    return position + len(content)
