"""The processes that a run is built on, and how far it is: what a membership begins with."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.distributed import Store as RendezvousStore

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of one membership epoch, before any process group exists."""

    rank: int
    """This process, 0 .. size - 1."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this rank's tensors live."""
    store: RendezvousStore
    """Rendezvous store that all ranks reach."""
    epoch: int = 0
    """Membership epoch; prefixes every key in the store."""
    timeout_s: float = TIMEOUT_S
    """Seconds after which a collective that nobody answers is an error."""
    backend: str | None = None
    """torch.distributed backend; None: NCCL for GPUs, gloo for CPU processes."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far the run is; with the config's seed it is the whole data cursor."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    skipped: list[int] = field(default_factory=list)
    """Batches that are left out, ascending."""
    spikes: int = 0
    """Loss spikes that were answered."""

    def batch(self, step: int | None = None) -> int:
        """Which batch a step trains on; None: the step under way."""
        number = self.step if step is None else step
        for skipped in self.skipped:
            number += skipped <= number
        return number

    def skip(self, batches: Iterable[int]) -> None:
        """Leave more batches out."""
        self.skipped = sorted({*self.skipped, *batches})
