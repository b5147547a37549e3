"""`python -m launch local` under the real torchrun, with workers that need no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "support" / "launch_worker.py"
ROOT = Path(__file__).parents[2]
PATIENCE_S = 45


@pytest.fixture
def start(tmp_path):
    """Start the launcher with two workers in a mode; whatever is left is killed afterwards."""
    started = []

    def start(mode, *options):
        command = [
            sys.executable,
            "-m",
            "launch",
            "local",
            "--set=processes=2",
            f"--folder={tmp_path}",
        ]
        process = subprocess.Popen(
            [*command, *options, "--", str(WORKER), str(tmp_path), mode],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in worker_pids(tmp_path):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def worker_pids(folder):
    texts = [(folder / f"pid.{rank}") for rank in (0, 1)]
    return [int(path.read_text()) for path in texts if path.exists() and path.read_text()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def end(process):
    _, stderr = process.communicate(timeout=PATIENCE_S)
    return process.returncode, stderr


def test_the_programs_exit_code_and_words_pass_through(start, tmp_path):
    (tmp_path / "status.json").write_text('{"exit_code": 5, "rank": 0, "error": "of an earlier run"}')
    code, stderr = end(start("exit:2"))
    assert code == 2
    assert "speaks" in stderr  # the first to end may be the only one that spoke
    assert "ChildFailedError" not in stderr and "earlier run" not in stderr
    assert "ChildFailedError" in (tmp_path / "logs" / "torchrun.log").read_text()
    env = json.loads((tmp_path / "env.0").read_text())
    assert env["WORLD_SIZE"] == "2" and env["MASTER_ADDR"] == "127.0.0.1"


def test_a_failure_that_nobody_reports_is_named(start):
    code, stderr = end(start("silent:9"))
    assert code not in (0, 64)
    assert "failed first, with exit code 9" in stderr


def test_sigterm_reaches_the_workers_and_they_decide(start, tmp_path):
    process = start("wait")
    wait_for(lambda: len(worker_pids(tmp_path)) == 2)
    process.send_signal(signal.SIGUSR1)
    code, stderr = end(process)
    assert code == 64
    assert (tmp_path / "got.0").exists() and (tmp_path / "got.1").exists()
    assert "ChildFailedError" not in stderr


def test_ctrl_c_asks_and_a_second_one_kills(start, tmp_path):
    process = start("deaf")
    wait_for(lambda: len(worker_pids(tmp_path)) == 2)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "got.0").exists() and (tmp_path / "got.1").exists())
    assert all(alive(pid) for pid in worker_pids(tmp_path))
    process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    assert code == 130
    assert "Ctrl-C again kills" in stderr
    wait_for(lambda: not any(alive(pid) for pid in worker_pids(tmp_path)))


def test_workers_are_told_when_the_launcher_is_killed(start, tmp_path):
    process = start("wait")
    wait_for(lambda: len(worker_pids(tmp_path)) == 2)
    process.kill()
    wait_for(lambda: not any(alive(pid) for pid in worker_pids(tmp_path)))
    assert (tmp_path / "got.0").exists() and (tmp_path / "got.1").exists()


def test_the_launcher_imports_no_torch():
    code = "import sys, launch.__main__, launch.local; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "'launch.local'" in modules
    assert "'torch'" not in modules and "'longctx'" not in modules and "'parallel'" not in modules
