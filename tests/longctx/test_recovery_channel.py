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


@pytest.mark.parametrize(("phase", "code"), [("backward", 1), ("checkpoint", 0)])
def test_a_rank_that_is_stuck_after_the_fence_ends_unless_it_saves(phase, code):
    ours, theirs = socket.socketpair()
    descriptor = theirs.fileno()
    stuck = subprocess.Popen([sys.executable, "-c", STUCK, str(descriptor), phase], pass_fds=[descriptor])
    theirs.close()
    lines = ours.makefile()
    assert json.loads(lines.readline())["kind"] == "warm"
    ours.sendall(json.dumps({"kind": "fence", "epoch": 1}).encode() + b"\n")
    said = [json.loads(line) for line in lines]  # until it has ended
    assert stuck.wait() == code
    assert any("did not let go" in each.get("error", "") for each in said) == bool(code)
