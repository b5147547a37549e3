"""What launch and the programs it starts agree on: plain data, described in docs/protocol.md.

Both sides hold their own constants; tests/test_protocol.py asserts that they agree.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

DONE = 0
FAILED = 1
BAD_INPUT = 2
PREFLIGHT_FAILED = 3
REQUEUE = 64
NO_PROGRESS = 65

STATUS_KEYS = ("exit_code", "rank", "error")
HEARTBEAT_KEYS = ("rank", "step", "phase", "progress")


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How the started program says that it ended."""

    exit_code: int
    """Exit code of the whole job."""
    rank: int
    """Rank that wrote the file: 0, or the first that failed."""
    error: str
    """One line for people; empty without an error."""


def read_status(path: Path) -> Status | None:
    """The status file, or None where the program did not write a valid one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Status(
            exit_code=int(content["exit_code"]),
            rank=int(content["rank"]),
            error=str(content["error"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_status(path: Path, status: Status) -> bool:
    """Say how the job ended, whole or not at all; returns whether nobody has said so before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.launch.partial")
    content = {"exit_code": status.exit_code, "rank": status.rank, "error": status.error}
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
