"""Attention without communication: every key is on this rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .engine import Gradients
from .plan import Shares, Step, own_step

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """One step: the rank's queries against its own keys."""

    step: Step

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """The one step."""
        yield self.step, k, v

    def gradients(self, k: Tensor) -> Gradients:
        """Keep what is put."""
        return _Keep()


def local_route(shares: Shares) -> LocalRoute:
    """The route of a ring of one rank."""
    return LocalRoute(own_step(shares, 0))


class _Keep:
    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def put(self, dk: Tensor, dv: Tensor) -> None:
        self._kept = dk, dv

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._kept is not None
        return self._kept
