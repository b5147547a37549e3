"""The end of an attempt: what the job's exit code is, and which rank failed first."""

import time
from dataclasses import dataclass
from pathlib import Path

from . import attempts
from .failure import first_failure, killed_worker
from .protocol import BAD_INPUT, DONE, NO_PROGRESS, PREFLIGHT_FAILED, REQUEUE, read_status

TRACEBACK_LINES = 30
FINAL = (DONE, BAD_INPUT, PREFLIGHT_FAILED, REQUEUE, NO_PROGRESS)


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """An attempt that is over."""

    folder: Path
    """Run folder."""
    attempt: str
    """Job id and restart count."""
    code: int
    """What the scheduler's step returned."""
    processes: int
    """Workers of a node."""
    failures: int
    """Failures without progress that may be tried again."""

    @property
    def scratch(self) -> Path:
        """Folder of this attempt."""
        return self.folder / "launch" / self.attempt


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """The rank that failed first."""

    rank: int
    """Its rank."""
    words: str
    """What happened."""


def verdict(end: End) -> tuple[int, list[str]]:
    """The job's exit code and the lines that explain it; recorded among the attempts."""
    status = read_status(end.folder / "status.json")
    code = end.code
    if status and (status.exit_code != DONE or end.code == 0):
        code = status.exit_code
    lines = [] if code in (DONE, REQUEUE) else _explain(end, code)
    past = attempts.read(end.folder)
    start = next((each for each in reversed(past) if each.attempt == end.attempt), None)
    record = attempts.Attempt(
        attempt=end.attempt,
        time=time.time(),
        later=start.later if start else 0,
        progress=start.progress if start else "",
        exit_code=code,
    )
    attempts.append(end.folder, record)
    tried = attempts.failures([*past, record])
    if code not in FINAL and tried <= end.failures:
        return REQUEUE, [*lines, f"failure {tried} of {end.failures} that restart.failures allows: again"]
    return code, lines


def _explain(end: End, code: int) -> list[str]:
    """The cause, its node and its traceback, in the place of everybody's echo."""
    cause = find_cause(end)
    if cause is None:
        unsaid = f"error: the step ended with {end.code}, and no rank said why; see {end.scratch}"
        return [_did_not_meet(end) or unsaid]
    hosts = _hosts(end.scratch)
    node = cause.rank // end.processes
    where = f" on {hosts[node]}" if node < len(hosts) else ""
    lines = [f"error: rank {cause.rank}{where} failed first: {cause.words}"]
    log = rank_log(end.scratch, cause.rank, end.processes, "stderr.log")
    if log is None:
        return lines
    return [*lines, *traceback_of(log), f"its whole output: {log}"]


def _did_not_meet(end: End) -> str:
    """Which nodes are missing where torchrun gave up waiting; empty: it did not."""
    reports = {path.parent.name: _text(path) for path in end.scratch.glob("node-*/torchrun.log")}
    waited = [name for name, report in reports.items() if "RendezvousTimeout" in report]
    if not waited:
        return ""
    silent = [host for index, host in enumerate(_hosts(end.scratch)) if f"node-{index}" not in reports]
    who = f"{', '.join(silent)} never started" if silent else f"{', '.join(sorted(waited))} waited in vain"
    return (
        f"error: the nodes did not meet within site.network.timeout: {who}; are the ports open between them?"
    )


def find_cause(end: End) -> Cause | None:
    """A rank that a signal killed, else the rank that wrote the status file, else torchrun's root cause."""
    reports = [_text(path) for path in sorted(end.scratch.glob("node-*/torchrun.log"))]
    killed = next((found for found in map(killed_worker, reports) if found), None)
    if killed:
        return Cause(rank=killed.rank, words=str(killed))
    status = read_status(end.folder / "status.json")
    if status and status.exit_code != DONE:
        return Cause(rank=status.rank, words=status.error or f"exit code {status.exit_code}")
    found = next((each for each in map(first_failure, reports) if each), None)
    return Cause(rank=found.rank, words=str(found)) if found else None


def rank_log(scratch: Path, rank: int, processes: int, name: str) -> Path | None:
    """The newest file of a rank's output."""
    node, local = divmod(rank, processes)
    found = scratch.glob(f"node-{node}/*/attempt_*/{local}/{name}")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def traceback_of(log: Path) -> list[str]:
    """The last traceback in a rank's output."""
    text = _text(log).replace("\0", "")
    _, found, rest = text.rpartition("Traceback (most recent call last):")
    return [found, *rest.strip("\n").splitlines()[-TRACEBACK_LINES:]] if found else []


def _hosts(scratch: Path) -> list[str]:
    return _text(scratch / "hosts").splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
