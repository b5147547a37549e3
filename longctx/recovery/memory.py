"""Host memory that replicated states need, asked for before the first step."""

import os
from pathlib import Path

from ..build import Run
from ..checkpoint.shares import run_tensors
from ..config.schema import RecoveryConfig
from ..errors import ConfigError
from .generations import KEPT, State

_GIB = 2**30


def predicted_bytes(state_bytes: int, *, replicas: int, local_ranks: int) -> int:
    """Host memory of one node: `KEPT` generations of each of its ranks, own and held.

    Args:
        state_bytes: parameters and moments of one rank.
        replicas: copies that are sent to other ranks.
        local_ranks: ranks of the node.
    """
    return state_bytes * KEPT * (1 + replicas) * local_ranks


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this machine, or the control groups that this process is in, can still give.

    Returns:
        None where nothing says.
    """
    return min([*_of_machine(root), *_of_groups(root)], default=None)


def _of_machine(root: Path) -> list[int]:
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return [int(lines["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return []


def _of_groups(root: Path) -> list[int]:
    """Of every group from this process's own up to the top, in both versions of control groups."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in entries:
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = _VERSION_1 if controllers else _VERSION_2
        group = top / path.lstrip("/")
        found += [_of_group(each, *names) for each in (group, *group.parents) if each.is_relative_to(top)]
    return [each for each in found if each is not None]


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def _of_group(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """What is used and could not be dropped counts against the limit."""
    try:
        lines = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        return int((group / limit).read_text()) - int((group / used).read_text()) + int(lines[droppable])
    except (OSError, KeyError, ValueError):  # "max": there is no limit
        return None


def usage() -> dict[str, int]:
    """Open descriptors and resident memory of this process; zeros where the system does not say."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"descriptor": len(os.listdir("/proc/self/fd")), "rss_mib": resident // 2**20}
    except OSError:
        return {"descriptor": 0, "rss_mib": 0}


def check_memory(run: Run, config: RecoveryConfig, *, local_ranks: int) -> None:
    """Refuse what would not fit.

    Raises:
        ConfigError: the node has less memory than the generations of its ranks need.
    """
    state = State(run_tensors(run)).num_bytes
    copies = max(0, config.replicas - (run.mesh.size("dp_replicate") - 1))
    need = predicted_bytes(state, replicas=copies, local_ranks=local_ranks)
    free = available_bytes()
    if free is not None and need > free:
        raise ConfigError(
            f"recovery.mode=replicate needs {need / _GIB:.1f} GiB of host memory on this node "
            f"({KEPT} generations of {local_ranks} ranks and {copies} replicas each, {state / _GIB:.2f} GiB "
            f"a generation), and {free / _GIB:.1f} GiB are available; use more nodes, lower "
            "recovery.replicas, or set recovery.mode=off"
        )
