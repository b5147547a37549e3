"""One description of a job for every way to start it: this machine, a list of hosts, Slurm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .units import BYTES, SECONDS

MINUTE_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """How the scheduler says that the time is nearly over."""

    name: Literal["USR1", "TERM"] = "USR1"
    """Signal to the workers: they finish the step, save and leave with 64."""
    before: int = field(default=0, metadata=SECONDS)
    """Seconds before the time limit; 0: three minutes, or more where the measured `stop_s` needs more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """When an attempt that ended is followed by another one."""

    mode: Literal["requeue", "chain", "array", "never"] = "requeue"
    """`requeue`: the same job again; `chain`: several jobs, one after the other; `array`: an array, one
    task at a time; for sites that refuse to requeue."""
    links: int = 1
    """Jobs of a chain or tasks of an array."""
    requeues: int = 100
    """Most restarts of one job; then it ends with 64 and waits for a person."""
    failures: int = 0
    """Most times that a failure (not a stop) is tried again."""
    no_progress: int = 3
    """Starts in a row with the same progress after which the job ends with 65."""
    progress: str = "ckpt/*"
    """Files in the run folder whose sorted names show progress."""
    workers: int = 0
    """Times that torchrun restarts all workers inside one attempt."""
    min_nodes: int = 0
    """Fewest nodes with which torchrun goes on inside one attempt; 0: all."""
    argv: tuple[str, ...] = ("run.resume=true",)
    """Arguments added to the program from the second attempt on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What the program runs in."""

    python: str = ""
    """Interpreter on the nodes; empty: that of the person who submits, or `python3` in an image."""
    image: str = ""
    """Container image, for a site with a container runtime."""
    setup: tuple[str, ...] = ()
    """Shell lines before the start, such as `source /opt/env.sh`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Nodes of one kind in a heterogeneous job."""

    nodes: int
    """Nodes of this kind."""
    directives: Mapping[str, str | int | bool | None] = field(default_factory=dict)
    """Directives of this part alone; null removes one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A program and the machines it needs."""

    name: str = "longctx"
    """Name in the queue."""
    nodes: int = 1
    """Machines; for a heterogeneous job the sum over `groups`."""
    groups: tuple[Group, ...] = ()
    """Parts of a heterogeneous job; empty: all nodes are alike."""
    processes: int = 0
    """Workers of one node; 0: one per device, or 1 without devices."""
    devices: int | None = None
    """Accelerators to ask for on one node; none: all that the site has."""
    spare_nodes: int = 0
    """Further nodes, of which preflight may put some in the place of bad ones."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Environment of the workers; null removes a variable. No credentials: see `secrets`."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variable -> file on the nodes that holds its value, read when the job starts."""
    mounts: tuple[str, ...] = ()
    """`host path[:path inside[:options]]` for containers; the working and run folders are mounted anyway."""
    environment: Environment = Environment()
    """Interpreter, image, setup."""
    time_limit: int = field(default=0, metadata=SECONDS)
    """Seconds after which the scheduler ends an attempt; 0: the site's own limit."""
    signal: Signal = Signal()
    """The word before the time limit."""
    restart: Restart = Restart()
    """What follows an attempt."""
    log_limit: int = field(default=64 * 2**20, metadata=BYTES)
    """Bytes that the output of one rank keeps on disk."""
    topology: str = "slurm"
    """Order of the nodes: `slurm` (its topology plugin, else names), or a file with one node a line."""
    argv: tuple[str, ...] = ()
    """The program, `-m module ...` or `script.py ...`; the command line sets it."""
    folder: str = ""
    """Run folder on a file system that all nodes share; the command line sets it."""
    workdir: str = ""
    """Working folder on the nodes; empty: the one of the person who submits."""
    world: int = 0
    """Processes that the program was checked for; 0: unknown."""
    stop_s: float = 0.0
    """Measured or expected seconds of a step and a checkpoint, which is what a stop takes; 0: unknown."""
