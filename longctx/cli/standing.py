"""Where a rank stands, told to whoever asks with SIGUSR2: its stacks, and its last call on each group.

The main thread may sit inside a collective for ever, where it runs no Python. So the stacks are written by
faulthandler inside the signal's own handler, and the calls, which torch's flight recorder holds, by a thread.
Both are text: the recorder's own files are pickles, which nothing here loads.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""The recorders of NCCL, where torch has it, and of other backends; TORCH_FR_BUFFER_SIZE turns them on."""


def answer(folder: Path, rank: int) -> None:
    """From now on SIGUSR2 leaves `stack_RANK.txt` and `calls_RANK.json` in a folder; this process goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.signal(signal.SIGUSR2, _nothing)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    stacks = (folder / f"stack_{rank}.txt").open("w")
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True, chain=True)
    arguments = (told, tell, folder / f"calls_{rank}.json")
    threading.Thread(target=_watch, args=arguments, name="standing", daemon=True).start()


def _nothing(number: int, frame: object) -> None:
    """A handler of Python's own has to be there for the thread to be woken."""


def _watch(told: socket.socket, tell: socket.socket, path: Path) -> None:
    while True:
        if signal.SIGUSR2 in told.recv(64):
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(last_calls()), encoding="utf-8")
            os.replace(partial, path)


def last_calls() -> list[dict[str, Any]]:
    """The newest collective of this rank on each of its process groups; empty where nothing is recorded.

    Sends and receives are left out: their numbers differ between ranks of a sound program too.
    """
    c10d = sys.modules.get("torch._C._distributed_c10d")
    newest: dict[str, dict[str, Any]] = {}
    for name in DUMPS:
        dump = getattr(c10d, name, None)
        entries = json.loads(dump()).get("entries", []) if dump else []
        for entry in sorted(entries, key=lambda entry: entry["record_id"]):
            if not entry["is_p2p"]:
                newest[entry["process_group"][0]] = _call(entry)
    members = _members()
    return [{"group": group, "ranks": members.get(group, []), **call} for group, call in newest.items()]


def _call(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "number": entry["collective_seq_id"],
        "call": entry["profiling_name"],
        "sizes": entry.get("input_sizes", []),
        "done": bool(entry["retired"]) or entry["state"] == "completed",
    }


def _members() -> dict[str, list[int]]:
    """Ranks of each process group, by the group's name."""
    module = sys.modules.get("torch.distributed.distributed_c10d")
    if module is None:
        return {}
    world = module._world
    return {name: sorted(world.pg_group_ranks.get(group, {})) for group, name in world.pg_names.items()}
