"""The degrees of every mesh axis, as frozen data."""

from dataclasses import asdict, dataclass
from math import prod

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of the mesh axes, outermost first; they multiply to the world size (`ep` divides fsdp)."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas that hold whole copies of the sharded state."""
    dp_shard: int = 1
    """Data-parallel groups that shard the state between them."""
    ring: int = 1
    """Ranks that pass keys and values around for one sequence."""
    ulysses: int = 1
    """Ranks that exchange heads for tokens for one sequence."""
    tp: int = 1
    """Ranks that split every matrix."""
    ep: int = 1
    """Ranks that split the experts; divides `fsdp`."""

    @property
    def cp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of parameters, gradients and optimizer state."""
        return self.dp_shard * self.cp

    @property
    def data_ranks(self) -> int:
        """Ranks of one pipeline stage and one tp slice."""
        return self.dp_replicate * self.fsdp

    @property
    def world_size(self) -> int:
        """Processes that these degrees need."""
        return self.pp * self.data_ranks * self.tp

    def check(self, world_size: int) -> None:
        """Refuse degrees that cannot be laid over `world_size` processes.

        Raises:
            ConfigError: a degree below 1, a product that differs from `world_size`, or an `ep`
                that does not divide dp_shard x ring x ulysses.
        """
        for name, degree in asdict(self).items():
            if degree < 1:
                raise ConfigError(f"parallel.{name}={degree}; choose at least 1")
        if self.world_size != world_size:
            axes = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
            degrees = {axis: getattr(self, axis) for axis in axes if getattr(self, axis) != 1}
            assert prod(degrees.values()) == self.world_size
            spelled = (
                " x ".join(f"parallel.{axis}={degree}" for axis, degree in degrees.items()) or "all degrees 1"
            )
            raise ConfigError(
                f"{spelled} need {self.world_size} processes, but the world has {world_size}; "
                "set parallel.dp_shard=auto or change a degree"
            )
        if self.fsdp % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} does not divide dp_shard x ring x ulysses = {self.fsdp}; "
                "choose a divisor"
            )
