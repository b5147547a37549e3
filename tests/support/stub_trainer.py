"""A trainer for a supervisor that needs no torch: `stub_trainer.py DESCRIPTOR FOLDER MODE`.

It leaves FOLDER/PID with its rank. Modes: `waits` never joins, `runs` joins and says that it computes.
"""

import json
import os
import socket
import sys
from pathlib import Path

channel = socket.socket(fileno=int(sys.argv[1]))
folder, mode = Path(sys.argv[2]), sys.argv[3]


def say(**message):
    channel.sendall(json.dumps(message).encode() + b"\n")


say(kind="warm")
(folder / str(os.getpid())).write_text("spare")
buffer = b""
while data := channel.recv(4096):
    *lines, buffer = (buffer + data).split(b"\n")
    for message in map(json.loads, lines):
        if message["kind"] == "assign":
            (folder / str(os.getpid())).write_text(str(message["rank"]))
        if message["kind"] in ("assign", "fence") and mode == "runs":
            say(kind="joined", epoch=message["epoch"], state=None)
        if message["kind"] == "form":
            say(kind="running", epoch=message["epoch"])
        if message["kind"] == "verdict":
            sys.exit(0)
