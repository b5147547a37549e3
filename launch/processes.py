"""Processes of this machine, read from /proc."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path


def parent_of(pid: int) -> int | None:
    """Parent of a living process; None for one that is gone or has ended (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name before ")" may hold anything
    return None if state in "ZX" else int(parent)


def children(pid: int) -> list[int]:
    """Living children of a process."""
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return sorted(each for each in everyone if parent_of(each) == pid)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal processes; one that is already gone is no error."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
