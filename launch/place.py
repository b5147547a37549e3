"""Where a process of torchrun stands in its job."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A node's place in the job, from the variables that torchrun sets."""

    node: int
    """Index of the node."""
    first_rank: int
    """Rank of its first process."""
    local_size: int
    """Its processes."""
    size: int
    """Processes of the job."""
    attempt: int
    """How often torchrun has started the job before."""
    host: str
    """Address of the first node."""
    port: int
    """Where torchrun's processes meet there; no other job has it at the time."""

    @property
    def job(self) -> str:
        """Name of the job, the same on all nodes."""
        return f"{self.host}:{self.port}"


def place(environment: Mapping[str, str]) -> Place:
    """This node's place, from the variables that torchrun sets."""
    local = int(environment["LOCAL_WORLD_SIZE"])
    return Place(
        node=int(environment["GROUP_RANK"]),
        first_rank=int(environment["RANK"]),
        local_size=local,
        size=int(environment["WORLD_SIZE"]),
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
    )
