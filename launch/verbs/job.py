"""`status`, `logs`, `requeue`, `cancel`, `hang`: a launched job, named by its run folder."""

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import attempts
from .. import hang as hanging
from ..errors import LaunchError, SpecError
from ..outcome import rank_log
from ..protocol import DONE, FAILED, read_status
from ..submit import recorded, scontrol, states

ANSWER_S = 3.0


def _parser(verb: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"launch {verb}", description=text)
    parser.add_argument("folder", type=Path, help="run folder")
    return parser


def status(argv: Sequence[str]) -> int:
    """Print the state of the job and its attempts."""
    parser = _parser("status", "How the job of a run folder stands.")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args(argv)
    job = recorded(options.folder)
    if job["backend"] == "slurm":
        found = [state for job_id in job["ids"] for state in _states(job_id)]
    else:
        found = [{"JobId": pid, "JobState": _here(int(pid))} for pid in job["ids"]]
    past = attempts.read(options.folder)
    end = read_status(options.folder / "status.json")
    content = {
        "jobs": {state["JobId"]: state["JobState"] for state in found},
        "nodes": next((state.get("NodeList", "") for state in found), ""),
        "attempts": sum(each.exit_code is None for each in past),
        "progress": attempts.progress(options.folder, "ckpt/*"),
        "exit_code": end.exit_code if end else None,
        "last_step": _last_step(options.folder),
    }
    if options.json:
        print(json.dumps(content))
    else:
        print("\n".join(f"{key:<10} {value}" for key, value in content.items()))
    return DONE


def logs(argv: Sequence[str]) -> int:
    """Print what a rank has written in the newest attempt."""
    parser = _parser("logs", "What a rank has printed in the newest attempt.")
    parser.add_argument("--rank", type=int, default=0, help="which rank")
    parser.add_argument("--lines", type=int, default=0, help="only the last lines; 0: all")
    options = parser.parse_args(argv)
    scratch, processes = _newest(options.folder), int(recorded(options.folder)["processes"])
    found = [rank_log(scratch, options.rank, processes, name) for name in ("stdout.log", "stderr.log")]
    if not any(found):
        raise SpecError(
            f"rank {options.rank} has no output in {scratch}; ranks have {_ranks(scratch, processes)}"
        )
    for path in filter(None, found):
        text = path.read_text(encoding="utf-8", errors="replace")
        first, hole, rest = text.partition("\0")
        if hole:
            text = f"{first}\n[... dropped, the limit is log_limit ...]\n{rest.lstrip(chr(0))}"
        print("\n".join(text.splitlines()[-options.lines :]), flush=True)
    return DONE


def requeue(argv: Sequence[str]) -> int:
    """Ask the job to save; its batch script then requeues it."""
    return _signal(argv, "requeue", "Save, leave with 64, and start again.")


def _signal(argv: Sequence[str], verb: str, text: str) -> int:
    options = _parser(verb, text).parse_args(argv)
    for job_id in _slurm_ids(options.folder):
        state = next(iter(_states(job_id)), {})
        if state.get("JobState") == "RUNNING":
            _scancel(["--batch", "--signal=USR1", job_id])
            print(f"job {job_id} saves and starts again")
        else:
            scontrol(["requeue", job_id])
            print(f"job {job_id} is in the queue again")
    return DONE


def cancel(argv: Sequence[str]) -> int:
    """Cancel the job; what runs gets SIGTERM, saves within the site's grace time and does not come back."""
    options = _parser("cancel", "Stop the job for good.").parse_args(argv)
    job = recorded(options.folder)
    if job["backend"] == "local":
        return _stop_here(options.folder, int(job["ids"][0]))
    for job_id in _slurm_ids(options.folder):
        _scancel([job_id])
        print(f"job {job_id} is cancelled")
    return DONE


def _here(pid: int) -> str:
    """Whether a launcher of this machine is still at work."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "has ended"
    return "RUNNING" if b"launch" in words and b"local" in words else "has ended"


def _stop_here(folder: Path, pid: int) -> int:
    if _here(pid) != "RUNNING":
        raise SpecError(f"the run of {folder} has ended, or runs on another machine; nothing to cancel here")
    os.kill(pid, signal.SIGTERM)
    print(f"process {pid} saves and stops")
    return DONE


def hang(argv: Sequence[str]) -> int:
    """Ask every rank where it stands and say who waits for whom."""
    parser = _parser("hang", "Where every rank stands, and which rank waits for which.")
    parser.add_argument("--world", type=int, default=0, help="ranks; 0: as many as have ever answered")
    options = parser.parse_args(argv)
    try:
        ids = _slurm_ids(options.folder)
    except SpecError:
        ids = []  # a run of this machine: its stacks are read as they stand
    for job_id in ids:
        _scancel(["--signal=USR2", job_id])
    time.sleep(ANSWER_S if ids else 0.0)
    world = options.world or len(list((options.folder / "logs").glob("stack_*.txt")))
    if not world:
        raise SpecError(f"{options.folder}/logs holds no stacks; send SIGUSR2 to the ranks, or name --world")
    places = hanging.read(options.folder, world)
    print("\n".join([*hanging.report(places), *hanging.unequal(hanging.calls(options.folder, world))]))
    return DONE if all(places.values()) else FAILED


def _states(job_id: str) -> list[dict[str, str]]:
    try:
        return states(job_id)
    except LaunchError:
        return [{"JobId": job_id, "JobState": "unknown to the scheduler"}]


def _slurm_ids(folder: Path) -> list[str]:
    job = recorded(folder)
    if job["backend"] != "slurm":
        raise SpecError(f"the job of {folder} was started by {job['backend']}: stop it there")
    return list(job["ids"])


def _scancel(arguments: Sequence[str]) -> None:
    done = subprocess.run(["scancel", *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise LaunchError(f"scancel {' '.join(arguments)}: {done.stderr.strip()}")


def _newest(folder: Path) -> Path:
    starts = [each for each in attempts.read(folder) if each.exit_code is None]
    if not starts:
        raise SpecError(f"{folder} has no attempt yet; longctx launch status {folder} says whether it waits")
    return folder / "launch" / starts[-1].attempt


def _ranks(scratch: Path, processes: int) -> str:
    nodes = len(list(scratch.glob("node-*")))
    return f"0 to {nodes * processes - 1}" if nodes else "not begun"


def _last_step(folder: Path) -> Any:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return json.loads(lines[-1]).get("step") if lines and lines[-1].endswith("}") else None
