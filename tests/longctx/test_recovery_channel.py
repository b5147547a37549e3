"""A rank that does not let go of a broken membership ends, so that another can take its place."""

import json
import socket
import subprocess
import sys

import pytest

STUCK = """
import sys, time
from longctx.pulse import Pulse
from longctx.recovery.channel import Channel
pulse = Pulse()
channel = Channel(int(sys.argv[1]), pulse)
channel.fence_with(lambda: None, within_s=0.5)
pulse(sys.argv[2])
channel.warm()
time.sleep(4)
channel.fence_with(None)
"""

LATE = """
import sys, time
from longctx.pulse import Pulse
from longctx.recovery.channel import Channel
channel = Channel(int(sys.argv[1]), Pulse())
channel.warm()
channel.join(None)
channel.running()
while not channel.fenced:
    time.sleep(0.01)
channel.fence_with(lambda: None, within_s=0.5)
time.sleep(4)
"""


def start(script, *arguments):
    """The process, and the supervisor's end of its channel."""
    ours, theirs = socket.socketpair()
    descriptor = theirs.fileno()
    words = [sys.executable, "-c", script, str(descriptor), *arguments]
    process = subprocess.Popen(words, pass_fds=[descriptor])
    theirs.close()
    lines = ours.makefile()
    assert json.loads(lines.readline())["kind"] == "warm"
    return process, ours, lines


def tell(ours, **message):
    ours.sendall(json.dumps(message).encode() + b"\n")


@pytest.mark.parametrize(("phase", "code"), [("backward", 1), ("checkpoint", 0)])
def test_a_rank_that_is_stuck_after_the_fence_ends_unless_it_saves(phase, code):
    stuck, ours, lines = start(STUCK, phase)
    tell(ours, kind="fence", epoch=1)
    said = [json.loads(line) for line in lines]  # until it has ended
    assert stuck.wait() == code
    assert any("did not let go" in each.get("error", "") for each in said) == bool(code)


def test_an_end_that_comes_before_the_rank_can_let_go_is_not_lost():
    late, ours, lines = start(LATE)
    tell(ours, kind="form", epoch=0)
    assert [json.loads(lines.readline())["kind"] for _ in range(2)] == ["joined", "running"]
    tell(ours, kind="fence", epoch=1)
    said = [json.loads(line) for line in lines]
    assert late.wait() == 1
    assert "did not let go" in said[-1]["error"]
