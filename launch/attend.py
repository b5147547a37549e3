"""Beside one node's torchrun: keeps the files of its ranks below a limit."""

import ctypes
import os
import time
from pathlib import Path

PERIOD_S = 2.0
BLOCK = 4096
KEEP_SIZE, PUNCH_HOLE = 1, 2


def attend(parent: int, logs: Path, limit: int) -> None:
    """Watch until the parent has gone.

    Args:
        parent: process of torchrun.
        logs: folder with the output of the ranks.
        limit: bytes that one file may take on disk.
    """
    while Path(f"/proc/{parent}").exists() and os.getppid() == parent:
        for path in logs.glob("*/attempt_*/*/*.log"):
            shrink(path, limit)
        time.sleep(PERIOD_S)


def shrink(path: Path, limit: int) -> bool:
    """Give the middle of a file that is too large back to the disk; whether that was needed.

    The writer holds the file open, so it cannot be replaced. A hole keeps every position: the first
    eighth of the limit and the newest half stay readable. A file system without holes in files loses
    all but what is written from now on.
    """
    if path.stat().st_blocks * 512 <= limit:
        return False
    first = limit // 8 // BLOCK * BLOCK
    length = (path.stat().st_size - limit // 2) // BLOCK * BLOCK - first
    with path.open("r+b") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        where, size = ctypes.c_long(first), ctypes.c_long(length)
        if length <= 0 or libc.fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, where, size) != 0:
            file.truncate(0)
    return True
