"""The argv and the environment that start torchrun on one machine."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"


def torchrun(argv: Sequence[str], *, processes: int, port: int, run_id: str, restarts: int = 0) -> list[str]:
    """Arguments of torch.distributed.run for one machine.

    The rendezvous names the loopback address and says that this machine hosts it: torchrun would
    otherwise compare the address with the hostname, which hangs where that does not resolve.

    Args:
        argv: the program, `script.py ...` or `-m module ...`.
        processes: workers.
        port: of the rendezvous; 0: any free one.
        run_id: name of the rendezvous.
        restarts: times that torchrun starts all workers again.
    """
    return [
        f"--nproc-per-node={processes}",
        "--nnodes=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={HOST}:{port}",
        f"--rdzv-id={run_id}",
        "--rdzv-conf=is_host=true",
        f"--local-addr={HOST}",
        f"--max-restarts={restarts}",
        *argv,
    ]


def agent(arguments: Sequence[str], *, log: Path, python: str = sys.executable) -> list[str]:
    """Command of the process that runs torchrun, its own messages going to `log`."""
    script = Path(__file__).with_name("agent.py")
    return [python, str(script), str(os.getpid()), str(log), *arguments]


def after(setup: Sequence[str], words: Sequence[str]) -> list[str]:
    """A command after shell lines; the shell becomes the command and keeps its process id."""
    return ["bash", "-c", "\n".join([*setup, 'exec "$@"']), "bash", *words] if setup else list(words)


def environment(base: Mapping[str, str], *, processes: int, cores: int) -> dict[str, str]:
    """The environment of torchrun and its workers; what the user has set stays.

    One share of the cores for each worker, and the loopback interface for gloo, which would
    otherwise look for the address of the hostname.
    """
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "GLOO_SOCKET_IFNAME": "lo"}
    return {**defaults, **base}
