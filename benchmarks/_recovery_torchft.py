"""torchft's answer to a lost replica, in the same run as ours: three data-parallel replicas on gloo.

Run as a script this file is one replica. A replica is killed with SIGKILL between two steps and started
again at once; the others go on as two meanwhile, so their steps are not those of the undisturbed run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import harness
from harness import Figure

REPLICAS, KILL_AT = 3, 20


def figures(repeats: int) -> dict[str, Figure]:
    """Seconds that survivors stall, and until the replica takes part again."""
    if importlib.util.find_spec("torchft") is None:
        missing = Figure(None, "s", "torchft is not installed (pip install torchft)")
        return {"torchft_stall_s": missing, "torchft_back_s": missing}
    stalls, backs = [], []
    for _ in range(repeats):
        stall, back = once()
        stalls.append(stall)
        backs.append(back)
    note = "survivors' slowest step; they go on without the replica's batch"
    return {
        "torchft_stall_s": Figure(harness.median(stalls), "s", note),
        "torchft_back_s": Figure(harness.median(backs), "s", "from the kill until it takes part again"),
    }


def once() -> tuple[float, float]:
    """One kill."""
    from torchft._torchft import LighthouseServer

    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=500, heartbeat_timeout_ms=1000
    )
    address = lighthouse.address().replace(os.uname().nodename, "127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="torchft-") as folder:
        base = Path(folder)
        replicas = [start(index, base, address) for index in range(REPLICAS)]
        while len(log(base, REPLICAS - 1)) < KILL_AT:
            time.sleep(0.01)
        replicas[-1].kill()
        killed_at = time.time()
        replicas[-1].wait()
        replicas[-1] = start(REPLICAS, base, address)  # its log is the successor's own
        while not log(base, REPLICAS):
            time.sleep(0.01)
        back = log(base, REPLICAS)[0] - killed_at
        ends = [moment for moment in log(base, 0) if moment <= log(base, REPLICAS)[0]]
        stall = max(b - a for a, b in pairwise(ends) if b > killed_at)
        for replica in replicas:
            replica.kill()
            replica.wait()
    lighthouse.shutdown()
    return stall, back


def start(index: int, base: Path, lighthouse: str) -> "subprocess.Popen[bytes]":
    """One replica."""
    words = os.environ | {
        "TORCHFT_LIGHTHOUSE": lighthouse,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, str(index), str(base)]
    with (base / f"{index}.err").open("w") as errors:
        return subprocess.Popen(command, env=words, stdout=errors, stderr=errors)


def log(base: Path, index: int) -> list[float]:
    """When a replica's steps ended."""
    path = base / f"{index}.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def replica(index: int, base: Path) -> None:
    """Train a small model until killed."""
    from datetime import timedelta

    import torch
    from torch.distributed import TCPStore
    from torchft import Manager, Optimizer, ProcessGroupGloo

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 256))
    inner = torch.optim.AdamW(model.parameters())

    def state() -> dict[str, object]:
        return {"model": model.state_dict(), "optim": inner.state_dict()}

    def load(found: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(found["model"])
        inner.load_state_dict(found["optim"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, for one rank
    manager = Manager(
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=2,
        replica_id=f"replica-{index}-",
        timeout=timedelta(seconds=10),
    )
    optimizer = Optimizer(manager, inner)
    with (base / f"{index}.log").open("w") as file:
        while True:
            optimizer.zero_grad()
            model(torch.randn(64, 256)).square().mean().backward()
            for parameter in model.parameters():
                manager.allreduce(parameter.grad).wait()
            optimizer.step()
            if index < REPLICAS or manager.is_participating():
                file.write(json.dumps(time.time()) + "\n")
                file.flush()
            time.sleep(0.02)


if __name__ == "__main__":
    replica(int(sys.argv[1]), Path(sys.argv[2]))
