"""A run folder belongs to one run at a time."""

import os
import subprocess
import sys

import pytest

from longctx.claim import LOCK, check_idle, check_unused, claim, enter
from longctx.errors import ConfigError, FolderBusy

HOLD = """
import os, sys
from pathlib import Path
from longctx.claim import claim
held = claim(Path(sys.argv[1]), job="a:1")
if len(sys.argv) > 2:
    os.execv(sys.executable, [sys.executable, "-c", "print(0, flush=True); input()"])
print(0, flush=True)
input()
"""
VARIABLES = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "0"}


@pytest.fixture(params=["plain", "exec"])
def held(request, tmp_path):
    """A process that holds the folder; one is another program by now than took it."""
    extra = ["exec"] if request.param == "exec" else []
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.read(2)
    yield process
    process.kill()
    process.communicate()


def test_a_folder_at_work_is_refused_to_others_and_known_to_its_own_job(held, tmp_path):
    for attempt in (
        lambda: check_unused(tmp_path, resume=True),
        lambda: claim(tmp_path, job="b:2"),
        lambda: enter(tmp_path, VARIABLES | {"RANK": "1", "MASTER_PORT": "2"}),
        lambda: enter(tmp_path, VARIABLES),
    ):
        with pytest.raises(FolderBusy, match=f"belongs to a run that is at work .process {held.pid} on"):
            attempt()
    check_idle(tmp_path, job="a:1")
    enter(tmp_path, VARIABLES | {"RANK": "1"})


def test_a_dead_process_holds_nothing_and_a_restart_waits_for_its_end(held, tmp_path):
    again = VARIABLES | {"TORCHELASTIC_RESTART_COUNT": "1"}
    enter(tmp_path, again | {"RANK": "1", "MASTER_PORT": "2"})
    held.kill()
    with enter(tmp_path, again):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    check_unused(tmp_path, resume=False)


def test_what_an_earlier_run_said_at_its_end_is_forgotten_but_not_by_a_restart(tmp_path):
    status = tmp_path / "status.json"
    status.write_text("{}")
    enter(tmp_path, VARIABLES | {"TORCHELASTIC_RESTART_COUNT": "1"}).__exit__(None, None, None)
    assert status.exists()
    with enter(tmp_path, VARIABLES):
        assert not status.exists()


def test_a_used_folder_is_refused_unless_it_is_continued(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"run\.resume=true"):
        check_unused(tmp_path, resume=False)
    check_unused(tmp_path, resume=True)


def test_where_nothing_can_be_written_the_folder_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ConfigError, match="nothing can be written there"):
        claim(tmp_path, job="a:1")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_unused(tmp_path / "file", resume=False)
