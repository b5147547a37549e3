"""The world as one object: axes, their groups, and the groups that share one sequence.

Data ranks are the ranks of dp_replicate x dp_shard x ring x ulysses in that order. A sequence
group of degree d = ring x ulysses is d consecutive data ranks whose first is a multiple of d;
ulysses is innermost, so that head exchanges stay inside a node.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, _collective_utils, _redistribute

from .comm import Counter, Group, barrier
from .config import AXES, ParallelConfig
from .errors import ConfigError

_FLAT = {
    "cp": ("ring", "ulysses"),
    "fsdp": ("dp_shard", "ring", "ulysses"),
    "data": ("dp_replicate", "dp_shard", "ring", "ulysses"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceGroups:
    """The groups of one rank for one split of the data ranks into ring x ulysses."""

    ring_rank: int
    """This rank's index in `ring_group`."""
    ulysses_rank: int
    """This rank's index in `ulysses_group`."""
    ring_group: Group
    """Ranks with the same ulysses_rank: keys and values travel here."""
    ulysses_group: Group
    """Consecutive ranks that exchange heads for tokens."""
    group: Group
    """All ring x ulysses ranks that share the sequence."""


@dataclass(slots=True, kw_only=True, eq=False)
class Mesh:
    """One membership of the job: who this process is on every axis, and the groups it belongs to."""

    config: ParallelConfig
    """The degrees."""
    device_type: str
    """"cpu" or "cuda"."""
    rank: int
    """Global rank."""
    world_size: int
    """Number of processes."""
    counter: Counter
    """Calls and bytes of every communication through this mesh's groups, on this rank."""
    _device_mesh: DeviceMesh
    _flat: dict[str, DeviceMesh] = field(default_factory=dict)
    _groups: dict[str, Group] = field(default_factory=dict)
    _splits: dict[tuple[int, int], SequenceGroups] = field(default_factory=dict)
    _owned: list[Any] = field(default_factory=list)

    def size(self, axis: str) -> int:
        """Number of ranks along an axis (also "cp", "fsdp", "data", "world")."""
        return self.group(axis).size

    def coordinate(self, axis: str) -> int:
        """This rank's index along an axis (also "cp", "fsdp", "data", "world")."""
        return self.group(axis).rank

    def group(self, axis: str) -> Group:
        """The ranks that differ from this one only along `axis`.

        Raises:
            ConfigError: no such axis.
        """
        try:
            return self._groups[axis]
        except KeyError:
            raise ConfigError(
                f"mesh axis {axis!r} does not exist; choose one of {sorted(self._groups)}"
            ) from None

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """Device mesh for FSDP2: dp_shard x cp flattened; with replicas dp_replicate outside it (HSDP)."""
        if self.config.dp_replicate == 1:
            return self._flat["fsdp"]
        with warnings.catch_warnings():
            # Slicing by a flattened name is the only form that 2.11 and 2.13 share for a 2-D HSDP mesh.
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            return self._device_mesh["dp_replicate", "fsdp"]

    @property
    def tp_mesh(self) -> DeviceMesh:
        """Device mesh of the tp axis, on which split parameters are stored."""
        return self._device_mesh["tp"]

    @property
    def data_group_index(self) -> int:
        """Which of the configured sequence groups this rank belongs to."""
        return self.coordinate("data") // self.config.cp

    @property
    def num_data_groups(self) -> int:
        """Number of configured sequence groups: dp_replicate x dp_shard."""
        return self.config.data_ranks // self.config.cp

    def sequence(self, ring: int, ulysses: int) -> SequenceGroups:
        """This rank's groups for a split of consecutive data ranks, built with the mesh.

        Raises:
            ConfigError: the split was not built; the message lists those that were.
        """
        try:
            return self._splits[ring, ulysses]
        except KeyError:
            built = sorted(self._splits)
            raise ConfigError(
                f"no groups for ring={ring} x ulysses={ulysses}; this mesh has (ring, ulysses) in {built}. "
                "Set parallel.ring and parallel.ulysses to this split, or both to 1 to have every split "
                "of the data ranks"
            ) from None

    def subgroup(self, axis: str, members: tuple[int, ...]) -> Group | None:
        """Some ranks along an axis, with a communicator of their own; every rank of the world calls it.

        Args:
            axis: one of `AXES`.
            members: indices along the axis, ascending.

        Returns:
            The group, on its members; None elsewhere.
        """
        grid = torch.arange(self.world_size).view(self.config.shape).movedim(AXES.index(axis), -1)
        found = None
        for line in grid.reshape(-1, self.size(axis)).tolist():
            ranks = tuple(line[member] for member in members)
            handle = dist.new_group(list(ranks), timeout=_default_timeout(self.device_type))
            if self.rank in ranks:
                self._owned.append(handle)
                found = Group(
                    axis=axis,
                    rank=ranks.index(self.rank),
                    ranks=ranks,
                    handle=handle,
                    counter=self.counter,
                )
        return found

    def host_group(self) -> Group:
        """All ranks, over host memory, with connections of its own; every rank of the world calls it."""
        ranks = tuple(range(self.world_size))
        timeout = _default_timeout(self.device_type)
        handle = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        self._owned.append(handle)
        return Group(axis="host", rank=self.rank, ranks=ranks, handle=handle)

    def set_timeout(self, seconds: float) -> None:
        """Seconds after which communication that nobody answers is an error, in every group."""
        for handle in (dist.distributed_c10d._get_default_group(), *self._owned):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), handle)

    def close(self) -> None:
        """Destroy the groups made for sequences and axes; the default group stays."""
        for handle in self._owned:
            dist.destroy_process_group(handle)
        self._owned.clear()
        self._groups.clear()
        self._splits.clear()
        _forget_specs()


def build_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """Build the mesh; every rank of the initialised default process group calls it.

    Args:
        config: degrees whose product is the world size.
        device_type: where tensors live, "cpu" or "cuda".

    Returns:
        The mesh. When ring and ulysses are both 1 it has groups for every split of the data ranks
        (degrees that are powers of two or divide them), else only for the configured split.

    Raises:
        ConfigError: no process group, or degrees that do not fit the world size.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "build_mesh needs torch.distributed.init_process_group first (torchrun sets its variables)"
        )
    world_size, rank = dist.get_world_size(), dist.get_rank()
    config.check(world_size)
    device_mesh = init_device_mesh(device_type, config.shape, mesh_dim_names=AXES)
    mesh = Mesh(
        config=config,
        device_type=device_type,
        rank=rank,
        world_size=world_size,
        counter=Counter(),
        _device_mesh=device_mesh,
    )
    timeout = _default_timeout(device_type)
    _add_axes(mesh, timeout)
    _add_splits(mesh, timeout)
    # A rank may finish its side of a connection first; if it closed the group, the other would fail.
    barrier(mesh.group("world"))
    mesh.counter.reset()
    return mesh


def _forget_specs() -> None:
    """Empty torch's caches of what operations make of DTensors.

    They are kept by meshes that compare equal: a later mesh would be given results on a closed one, whose
    groups' names mean others by then. And they hold its groups, two threads of gloo's each.
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    propagator.propagate_op_sharding.cache_clear()
    for holder, name in (
        (torch._C, "_clear_DTensor_sharding_propagator_cache"),
        (_redistribute, "clear_redistribute_planner_cache"),
        (getattr(propagator, "_propagate_tensor_meta_cached", None), "cache_clear"),
        (getattr(_redistribute, "_gen_transform_infos", None), "cache_clear"),
        (_collective_utils.MeshTopoInfo.build_from_mesh, "cache_clear"),
    ):
        getattr(holder, name, lambda: None)()  # torch 2.11 has not all of them


def _default_timeout(device_type: str) -> timedelta:
    # New groups do not inherit the default group's timeout: without this a silent peer costs 30 minutes.
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device(device_type))
    timeout: timedelta = getattr(backend.options, "_timeout", dist.default_pg_timeout)
    return timeout


def _add_axes(mesh: Mesh, timeout: timedelta) -> None:
    everyone = dist.distributed_c10d._get_default_group()
    world = tuple(range(mesh.world_size))
    mesh._groups["world"] = Group(
        axis="world", rank=mesh.rank, ranks=world, handle=everyone, counter=mesh.counter
    )
    for name, axes in _FLAT.items():
        mesh._flat[name] = mesh._device_mesh[axes]._flatten(name)
    for name in (*AXES, *_FLAT):
        handle = (mesh._flat[name] if name in mesh._flat else mesh._device_mesh[name]).get_group()
        ranks = tuple(dist.get_process_group_ranks(handle))
        mesh._groups[name] = Group(
            axis=name, rank=ranks.index(mesh.rank), ranks=ranks, handle=handle, counter=mesh.counter
        )
        if handle is not everyone and handle not in mesh._owned:
            dist.distributed_c10d._set_pg_timeout(timeout, handle)
            mesh._owned.append(handle)


def _add_splits(mesh: Mesh, timeout: timedelta) -> None:
    handles: dict[tuple[int, ...], Any] = {}
    for ranks in _all_groups(mesh.config):
        # Every rank names every group in one order, as new_group demands; only members pay for it.
        handle = dist.new_group(list(ranks), timeout=timeout)
        if mesh.rank in ranks:
            handles[ranks] = handle
            mesh._owned.append(handle)
    data = mesh.group("data")

    def group(axis: str, members: Iterable[int]) -> Group:
        ranks = tuple(data.ranks[i] for i in members)
        return Group(
            axis=axis,
            rank=ranks.index(mesh.rank),
            ranks=ranks,
            handle=handles.get(ranks),
            counter=mesh.counter,
        )

    for (ring, ulysses), members in sequence_splits(mesh.config, data.rank).items():
        ring_group = group("ring", members["ring"])
        ulysses_group = group("ulysses", members["ulysses"])
        mesh._splits[ring, ulysses] = SequenceGroups(
            ring_rank=ring_group.rank,
            ulysses_rank=ulysses_group.rank,
            ring_group=ring_group,
            ulysses_group=ulysses_group,
            group=group("cp", members["cp"]),
        )


def _all_groups(config: ParallelConfig) -> list[tuple[int, ...]]:
    """Global ranks of every sequence group of more than one rank, each once, in an order all ranks share."""
    local = {
        tuple(members)
        for rank in range(config.data_ranks)
        for split in sequence_splits(config, rank).values()
        for members in split.values()
        if len(members) > 1
    }
    stages = [range(pp * config.data_ranks, (pp + 1) * config.data_ranks) for pp in range(config.pp)]
    return [
        tuple(stage[i] * config.tp + tp for i in members)
        for stage, tp in product(stages, range(config.tp))
        for members in sorted(local)
    ]


def sequence_splits(config: ParallelConfig, data_rank: int) -> Mapping[tuple[int, int], dict[str, range]]:
    """Data ranks that share a sequence with `data_rank`, for every split the mesh has.

    Args:
        config: degrees.
        data_rank: index among the data ranks.

    Returns:
        (ring, ulysses) -> members of this rank's "ring", "ulysses" and "cp" group, as data ranks.
        Splits whose aligned block does not fit among the data ranks are left out for that rank.
    """
    splits = {}
    for ring, ulysses in _wanted(config):
        degree = ring * ulysses
        start = data_rank // degree * degree
        if start + degree > config.data_ranks:
            continue
        inner = data_rank // ulysses * ulysses
        splits[ring, ulysses] = {
            "ring": range(start + data_rank % ulysses, start + degree, ulysses),
            "ulysses": range(inner, inner + ulysses),
            "cp": range(start, start + degree),
        }
    return splits


def _wanted(config: ParallelConfig) -> list[tuple[int, int]]:
    if config.cp > 1:
        return [(1, 1), (config.ring, config.ulysses)]
    ranks = config.data_ranks
    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0 or d & (d - 1) == 0]
    return [(r, u) for r, u in product(degrees, degrees) if r * u in degrees]
