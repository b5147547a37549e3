"""A program for torchrun that needs no torch: `launch_worker.py FOLDER MODE`.

Every rank leaves FOLDER/pid.RANK when it is ready and FOLDER/got.RANK when SIGTERM reaches it.
Modes: `exit:N` reports and exits with N, `silent:N` exits with N and reports nothing,
`wait` runs until SIGTERM, then reports and exits with 64, `deaf` ignores SIGTERM.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, (mode, _, number) = Path(sys.argv[1]), sys.argv[2].partition(":")
rank = os.environ["RANK"]


def stop(*_):
    (folder / f"got.{rank}").touch()


def report(exit_code: int) -> int:
    if rank == "0":
        status = {"exit_code": exit_code, "rank": 0, "error": "planned" if exit_code else ""}
        (folder / "status.json").write_text(json.dumps(status))
    return exit_code


signal.signal(signal.SIGTERM, stop)
(folder / f"env.{rank}").write_text(json.dumps(dict(os.environ)))
(folder / f"pid.{rank}").write_text(str(os.getpid()))
print(f"rank {rank} speaks", file=sys.stderr, flush=True)
while mode in ("wait", "deaf") and (mode == "deaf" or not (folder / f"got.{rank}").exists()):
    time.sleep(0.02)
sys.exit(int(number) if mode == "silent" else report(64 if mode == "wait" else int(number)))
