"""A job on a plain list of hosts: one torchrun line for each, to paste or to send by ssh."""

import secrets
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import SpecError
from .load import Loaded
from .local import say
from .protocol import DONE, read_status
from .quote import check_name, exports, quote, words
from .sites import Site
from .spec import Job

POLL_S = 0.2
PATIENCE_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What one host runs."""

    host: str
    """The host."""
    command: str
    """A shell line."""


def lines(loaded: Loaded, *, port: int, run_id: str) -> list[Line]:
    """The line of every host; the first host is where all others meet.

    Raises:
        SpecError: fewer hosts than nodes.
    """
    job, site = loaded.job, loaded.site
    if len(site.hosts) < job.nodes:
        raise SpecError(
            f"nodes={job.nodes} and {len(site.hosts)} hosts; add to site.hosts or use --hosts FILE"
        )
    hosts = site.hosts[: job.nodes]
    return [
        Line(host=host, command=_line(job, site, index, f"{port} {run_id}"))
        for index, host in enumerate(hosts)
    ]


def torchrun_words(job: Job, address: str, *, index: int, port: int, run_id: str) -> list[str]:
    """Arguments of torchrun on one node of several.

    Who hosts the store is said outright, and the order of the nodes is the order of their local
    addresses: see templates/node.sh.
    """
    least = f"{job.restart.min_nodes}:" if job.restart.min_nodes else ""
    return [
        f"--nnodes={least}{job.nodes}",
        f"--nproc-per-node={job.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{port}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf=is_host={'false' if index else 'true'}",
        f"--local-addr={f'~{index:05d}' if index else address}",
        f"--max-restarts={job.restart.workers}",
        *job.argv,
    ]


def _line(job: Job, site: Site, index: int, meeting: str) -> str:
    port, run_id = meeting.split()
    python = job.environment.python or sys.executable
    arguments = torchrun_words(job, site.hosts[0], index=index, port=int(port), run_id=run_id)
    env: dict[str, str | None] = {}
    if site.network.interface:
        env = {name: site.network.interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    parts = [f"cd {quote(job.workdir)}", *site.setup, *job.environment.setup]
    parts += exports({**env, **site.env, **job.env})
    for name, path in job.secrets.items():
        check_name(name)
        parts.append(f"{name}=$(cat -- {quote(path)}) && export {name}")
    parts.append("trap '' USR1 USR2")  # torchrun would die of them, the workers take them
    return " && ".join([*parts, f"exec {quote(python)} -m torch.distributed.run {words(arguments)}"])


def choose_port(site: Site) -> int:
    """A port of the site's range, another one for every launch."""
    return site.network.port_first + secrets.randbelow(site.network.port_count)


def over_ssh(loaded: Loaded, jobs: list[Line]) -> int:
    """Start every line through `site.ssh`, pass a stop on, return the job's exit code.

    A host that ends badly ends the others after half a minute, unless the job goes on with fewer
    (`restart.min_nodes`); then the first host, which all others need, decides.
    """
    status = Path(loaded.job.folder, "status.json")
    status.unlink(missing_ok=True)
    running = {each.host: _remote(loaded.site, each) for each in jobs}
    stop = _pass_on(running)
    try:
        code = _wait(running, elastic=loaded.job.restart.min_nodes > 0)
    finally:
        for number, handler in stop.items():
            signal.signal(number, handler)
    said = read_status(status)
    return said.exit_code if said and (said.exit_code or code == DONE) else code


def _wait(running: "dict[str, subprocess.Popen[bytes]]", *, elastic: bool) -> int:
    """The exit code of the first host to end badly; of the first host where others may be lost."""
    ended: dict[str, float] = {}
    while any(process.poll() is None for process in running.values()):
        for host, process in running.items():
            if process.poll() not in (None, DONE) and host not in ended:
                ended[host] = time.monotonic()
                say(f"{host} ended with {_code(process)}")
        if ended and not elastic and time.monotonic() - min(ended.values()) > PATIENCE_S:
            for process in running.values():
                process.terminate()
        time.sleep(POLL_S)
    if elastic:
        return _code(next(iter(running.values())))
    codes = [_code(running[host]) for host in ended] or [_code(each) for each in running.values()]
    return next((code for code in codes if code), DONE)


def _code(process: "subprocess.Popen[bytes]") -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _remote(site: Site, line: Line) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*site.ssh, line.host, f"bash -c {shlex.quote(line.command)}"], start_new_session=True
    )


def _pass_on(running: "dict[str, subprocess.Popen[bytes]]") -> "dict[int, Any]":
    """TERM and Ctrl-C become TERM of every connection; sshd then ends the far side."""

    def handler(number: int, frame: FrameType | None) -> None:
        for process in running.values():
            process.terminate()

    return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
