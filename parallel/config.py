"""Degrees of parallelism: a pure record without torch."""

import math
from dataclasses import dataclass, fields

from .errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
"""Mesh axes, outermost first; `ep` divides the fsdp ranks and is no axis of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How many ways each axis splits the job; the product of the axes is the world size."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Full replicas of the sharded model (HSDP's outer axis)."""
    dp_shard: int = 1
    """Ranks that share parameters and hold different sequences."""
    ring: int = 1
    """Ranks that pass keys and values around (across nodes)."""
    ulysses: int = 1
    """Ranks that exchange heads for tokens (inside a node)."""
    tp: int = 1
    """Tensor-parallel ranks (innermost)."""
    ep: int = 1
    """Expert-parallel ranks; divides fsdp = dp_shard x ring x ulysses."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"parallel.{field.name}={value!r} must be a whole number of ranks, at least 1"
                )
        if self.fsdp % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} must divide dp_shard x ring x ulysses = {self.fsdp}; "
                f"choose one of {[d for d in range(1, self.fsdp + 1) if self.fsdp % d == 0]}"
            )

    @property
    def cp(self) -> int:
        """Ranks that share one sequence: ring x ulysses."""
        return self.ring * self.ulysses

    @property
    def fsdp(self) -> int:
        """Ranks over which parameters are sharded: dp_shard x cp."""
        return self.dp_shard * self.cp

    @property
    def data_ranks(self) -> int:
        """Ranks among which tokens are divided: dp_replicate x dp_shard x cp."""
        return self.dp_replicate * self.fsdp

    @property
    def world_size(self) -> int:
        """Product of all axes."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    def check(self, world_size: int) -> None:
        """Refuse degrees that do not multiply to the number of processes.

        Args:
            world_size: number of processes.

        Raises:
            ConfigError: naming the product and a key to change.
        """
        if self.world_size == world_size:
            return
        degrees = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, self.shape, strict=True))
        rest = self.world_size // self.dp_shard
        hint = (
            f"set parallel.dp_shard={world_size // rest}"
            if world_size % rest == 0
            else f"start {self.world_size}, or lower one of the degrees"
        )
        raise ConfigError(
            f"parallel degrees {degrees} need {self.world_size} processes, not {world_size}; {hint}"
        )
