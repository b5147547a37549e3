"""A node's supervisor with trainers that need no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "support" / "stub_trainer.py"
VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def supervise(tmp_path):
    """Start a supervisor of two trainers and a spare; it does not outlive the test."""
    started = []

    def start(mode):
        own = ["--folder", str(tmp_path / "run"), "--", str(STUB), "{}", str(tmp_path), mode]
        command = [sys.executable, "-m", "launch.supervise", *own]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | VARIABLES, stderr=subprocess.PIPE, text=True)
        )
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(folder, ranks):
    """Process ids by what their trainers have said to be, once these are there and alive."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        said = {path: path.read_text() for path in folder.iterdir() if path.name.isdigit()}
        alive = {path.name: word for path, word in said.items() if Path("/proc", path.name).exists()}
        if sorted(alive.values()) == sorted(ranks):
            return {word: int(name) for name, word in alive.items()}
        time.sleep(0.02)
    raise AssertionError(f"{said} is not {ranks}")


def test_a_stop_before_the_first_step_ends_the_job_at_once(supervise, tmp_path):
    process = supervise("waits")
    wait_for(tmp_path, ["0", "1"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 64
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 64
    words = process.stderr.read()
    assert words.count("stopped before the first step; nothing was saved") == 1
    assert "takes its place" not in words


def test_a_spare_that_dies_is_replaced(supervise, tmp_path):
    supervise("runs")
    first = wait_for(tmp_path, ["0", "1", "spare"])
    os.kill(first["spare"], signal.SIGKILL)
    (tmp_path / str(first["spare"])).unlink()
    second = wait_for(tmp_path, ["0", "1", "spare"])
    assert second["spare"] != first["spare"] and second["0"] == first["0"]


def test_a_second_job_leaves_a_folder_that_is_in_use_alone(supervise, tmp_path):
    supervise("runs")
    wait_for(tmp_path, ["0", "1", "spare"])
    address = (tmp_path / "run" / "control.json").read_text()
    own = ["--folder", str(tmp_path / "run"), "--", str(STUB), "{}", str(tmp_path), "runs"]
    second = subprocess.run(
        [sys.executable, "-m", "launch.supervise", *own],
        cwd=ROOT,
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 2 and "belongs to a run that is at work" in second.stderr
    assert (tmp_path / "run" / "control.json").read_text() == address
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_rank_that_waits_for_a_supervisor_in_vain_can_be_stopped():
    command = [sys.executable, "-m", "launch.supervise", "--folder", "run", "--", "x"]
    waiting = subprocess.Popen(command, cwd=ROOT, env=os.environ | VARIABLES | {"LOCAL_RANK": "1"})
    time.sleep(1)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=10) == -signal.SIGTERM
