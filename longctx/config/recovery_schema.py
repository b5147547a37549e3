"""Keys of the section `recovery`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig:
    """What happens when a rank is lost."""

    mode: Literal["replicate", "off"] = "replicate"
    """replicate: with more than one process, every rank's state is kept by peers too and a lost rank is
    replaced; off: a lost rank ends the run, checkpoints remain."""
    every: int = 1
    """Steps between the states that are kept; the steps since the last one are computed again."""
    replicas: int = 1
    """Ranks that keep a copy of each rank's state; replicas of `parallel.dp_replicate` count."""
    compare_every: int = 100
    """Steps between comparisons of ranks that hold the same shards (dp_replicate > 1); 0: never."""
    spares: int = 1
    """Idle processes per node, with everything imported, that take the place of a lost rank."""
    heartbeat_s: float = 10.0
    """Seconds of silence after which a process is killed and replaced."""
    hang_s: float = 600.0
    """Seconds without progress of any rank after which the one furthest behind is killed and replaced."""
    connect_s: float = 30.0
    """Seconds that ranks have to connect when a membership forms, and to let go of a broken one."""
    max_failures: int = 3
    """Losses of one rank in a row without a new step between them; more end the run with exit code 65."""
