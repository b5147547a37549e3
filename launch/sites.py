"""What differs between clusters; files of this form live in configs/cluster/."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .units import BYTES, SECONDS

Directives = Mapping[str, str | int | bool | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """How the nodes find each other."""

    interface: str = ""
    """Interface for gloo and NCCL, such as ib0; empty: their own choice."""
    port_first: int = 20000
    """First port that a rendezvous may take."""
    port_count: int = 10000
    """Ports from there on; each job takes the one that its id and restart count give."""
    address: Literal["slurm", "name"] = "slurm"
    """Address of the first node: the one Slurm itself uses (NodeAddr), or the node's name."""
    timeout: int = field(default=600, metadata=SECONDS)
    """Seconds that nodes wait for each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How images are started."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """Container runtime of the nodes."""
    options: tuple[str, ...] = ()
    """Further options: of srun for pyxis, of `apptainer exec` for apptainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Data copied to each node before the start."""

    source: str
    """File or folder on the shared file system."""
    target: str
    """Folder on the node's own disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What preflight demands of every node."""

    enabled: bool = True
    """Whether nodes are checked before the first step."""
    disk: int = field(default=2**30, metadata=BYTES)
    """Free bytes in the run folder."""
    shm: int = field(default=64 * 2**20, metadata=BYTES)
    """Bytes of /dev/shm."""
    clock: float = 5.0
    """Most seconds between a node's clock and the shared file system's."""
    timeout: int = field(default=120, metadata=SECONDS)
    """Seconds that the nodes have to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One cluster."""

    name: str = "site"
    """Name of the cluster."""
    scheduler: Literal["slurm", "none"] = "slurm"
    """Who gives out the nodes."""
    devices: int = 0
    """Accelerators of one node; 0: the job runs on CPU."""
    device_directive: str = "gpus-per-node={devices}"
    """How devices are asked for, such as `gres=gpu:h100:{devices}`; empty: not at all."""
    directives: Directives = field(default_factory=dict)
    """sbatch options by long name: a value, true for a flag, null to remove one of ours."""
    extra_lines: tuple[str, ...] = ()
    """Lines put under the directives as they stand."""
    srun: Directives = field(default_factory=dict)
    """srun options of the training step, same rules."""
    modules: tuple[str, ...] = ()
    """Modules to load."""
    setup: tuple[str, ...] = ()
    """Shell lines before anything else runs in the job."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Environment for every job of the site; null removes a variable."""
    network: Network = Network()
    """Interface, ports, addresses."""
    container: Container = Container()
    """Container runtime."""
    stage: tuple[Stage, ...] = ()
    """Data for the node's own disk."""
    checks: Checks = Checks()
    """Preflight."""
    grace: int = field(default=0, metadata=SECONDS)
    """Seconds between the site's preemption signal and the kill (Slurm's GraceTime, KillWait); 0: unknown."""
    template: str = ""
    """Template of the batch script, next to the site file; empty: ours."""
    hosts: tuple[str, ...] = ()
    """Hosts, for a site without a scheduler; the first one hosts the rendezvous."""
    ssh: tuple[str, ...] = ("ssh", "-o", "BatchMode=yes")
    """Command that reaches a host, used only if asked for."""
