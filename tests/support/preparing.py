"""Runs of `prepare` in processes of their own, to be killed, stopped or raced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import json, sys
from longctx.config.schema import DataConfig
from longctx.data.prepare import prepare
if __name__ == "__main__":
    prepared = prepare(DataConfig(**json.loads(sys.argv[1])), chunk_bytes=int(sys.argv[2]))
    said = {"created": prepared.created, "prefix": prepared.prefix, "torch": "torch" in sys.modules}
    print(json.dumps(said))
"""
MARK = "LONGCTX_TEST_MARK"


def start_prepare(folder: Path, options: dict, *, chunk_bytes: int = 1 << 22) -> subprocess.Popen:
    """Start `prepare` with these keys of the section `data`; its processes carry a mark of their own."""
    import json

    script = folder / "run_prepare.py"
    script.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(options), str(chunk_bytes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK: str(folder), "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
        preexec_fn=_hear_control_c,
    )


def _hear_control_c() -> None:
    """Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, what: str, *, timeout_s: float = 30.0):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.002)
    raise AssertionError(f"{what}: not within {timeout_s} s")


def processes_of(folder: Path) -> list[int]:
    """Living processes that carry the folder's mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            marked = entry.name.isdigit() and f"{MARK}={folder}".encode() in (
                entry / "environ"
            ).read_bytes().split(b"\0")
            if marked and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def stop_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """Signal a process and all that it started, as a terminal does."""
    os.killpg(process.pid, number)
