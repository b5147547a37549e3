"""The host half of `doctor`: what can be said of one machine without torch.

Every node of a job writes its answer to the shared run folder before the first step; `begin` compares.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .local import port_problem

PACKAGES = ("torch", "longctx-runtime", "numpy", "flash-attn")
SHM = Path("/dev/shm")
_QUERY = ["nvidia-smi", "--format=csv,noheader,nounits"]
_ECC = "--query-gpu=name,ecc.errors.uncorrected.volatile.total"
_BAD_XID = ("48", "62", "63", "64", "74", "79", "94", "95", "119", "120")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """What a machine must offer."""

    folder: Path
    """Folder on the shared file system that must be writable."""
    disk: int = 0
    """Free bytes there."""
    shm: int = 0
    """Bytes of /dev/shm."""
    clock: float = 5.0
    """Most seconds between this clock and the file system's."""
    devices: int = 0
    """Accelerators."""
    port: int = 0
    """Port of the rendezvous; 0: none is asked about."""
    names: tuple[str, ...] = ()
    """Names of other nodes that must resolve here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one machine says."""

    node: str
    """Its name in the job."""
    facts: dict[str, Any]
    """Versions and sizes; those under `versions` must be equal everywhere."""
    problems: tuple[str, ...]
    """Why it cannot take part; empty: it can."""


def examine(demands: Demands, node: str) -> Answer:
    """Everything that is to be known about this machine."""
    facts: dict[str, Any] = {"versions": versions(), "topology": os.environ.get("SLURM_TOPOLOGY_ADDR", "")}
    problems = []
    for check in (_writable, _disk, _shm, _clock, _names, _devices):
        try:
            problem = check(demands, facts)
        except OSError as error:
            problem = f"{check.__name__[1:]}: {error.strerror or error}"
        if problem:
            problems.append(problem)
    return Answer(node=node, facts=facts, problems=tuple(problems))


def write(answer: Answer, folder: Path) -> Path:
    """Put an answer where `begin` looks for it, whole or not at all."""
    path = folder / f"preflight-{answer.node}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(answer)), encoding="utf-8")
    os.replace(partial, path)
    return path


def read(folder: Path, nodes: list[str]) -> dict[str, Answer]:
    """The answers that are there."""
    answers = {}
    for node in nodes:
        try:
            raw = json.loads((folder / f"preflight-{node}.json").read_text(encoding="utf-8"))
            answers[node] = Answer(node=raw["node"], facts=raw["facts"], problems=tuple(raw["problems"]))
        except (OSError, ValueError, KeyError):
            continue
    return answers


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["driver"] = driver.read_text(encoding="utf-8").splitlines()[0]
    return found


def _writable(demands: Demands, facts: dict[str, Any]) -> str | None:
    probe = demands.folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        return f"the run folder {demands.folder} is not writable: {error.strerror}; mount it on every node"
    return None


def _disk(demands: Demands, facts: dict[str, Any]) -> str | None:
    facts["disk_bytes"] = free = shutil.disk_usage(demands.folder).free
    if free < demands.disk:
        return f"{free} bytes free in {demands.folder}, wanted site.checks.disk={demands.disk}"
    return None


def _shm(demands: Demands, facts: dict[str, Any]) -> str | None:
    facts["shm_bytes"] = size = shutil.disk_usage(SHM).total if SHM.exists() else 0
    if size < demands.shm:
        return f"/dev/shm has {size} bytes, wanted site.checks.shm={demands.shm}; NCCL and loaders need it"
    return None


def _clock(demands: Demands, facts: dict[str, Any]) -> str | None:
    """This clock against the shared file system's, which all nodes have in common."""
    probe = demands.folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    before = time.time()
    probe.write_text("", encoding="utf-8")
    after, there = time.time(), probe.stat().st_mtime
    probe.unlink()
    facts["clock_s"] = off = max(before - there, there - after, 0.0)
    if off > demands.clock:
        return f"the clock is {off:.1f} s off the file system's, allowed site.checks.clock={demands.clock}"
    return None


def _names(demands: Demands, facts: dict[str, Any]) -> str | None:
    """What names resolve to. A loopback address for the own one is a trap that the launcher avoids."""
    name = facts["hostname"] = socket.gethostname()
    facts["address"] = _resolved(name)
    facts["port_free"] = port_problem(demands.port) is None
    strange = [each for each in demands.names if not _resolved(each)]
    if strange:
        return f"the name {strange[0]} does not resolve here; set site.network.address=slurm"
    return None


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _devices(demands: Demands, facts: dict[str, Any]) -> str | None:
    rows = _smi(_ECC) if shutil.which("nvidia-smi") else []
    facts["devices"] = [row[0] for row in rows]
    if len(rows) < demands.devices:
        return f"{len(rows)} GPUs answer, wanted {demands.devices}"
    bad = [index for index, row in enumerate(rows) if row[-1].isdigit() and int(row[-1])]
    if bad:
        return f"GPU {bad[0]} has uncorrected ECC errors since the last reset"
    xid = _xid(_kernel_log()) if rows else None
    return f"the kernel log holds Xid {xid}: reset or replace the GPU" if xid else None


def _smi(query: str) -> list[list[str]]:
    try:
        done = subprocess.run([*_QUERY, query], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _kernel_log() -> str:
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=30, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _xid(log: str) -> str | None:
    """The first Xid in a kernel log that says that hardware is broken."""
    found = (
        line.partition("): ")[2].partition(",")[0].strip() for line in log.splitlines() if "NVRM: Xid" in line
    )
    return next((number for number in found if number in _BAD_XID), None)
