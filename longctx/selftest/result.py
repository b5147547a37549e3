"""What a cell of the parity matrix showed. Without torch."""

from dataclasses import dataclass

from .cells import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a cell showed; equal on all ranks, but for the steps, which only rank 0 judges."""

    cell: Cell
    """The combination."""
    error: float
    """Largest difference of loss, logits or a gradient, over its tensor's scale."""
    tensor: str
    """Where it is."""
    steps_error: float
    """Largest relative difference of loss or gradient norm over the optimizer steps; 0 without any."""
    tolerance: float
    """The most that either may be."""

    @property
    def good(self) -> bool:
        """Whether the cell equals one process (a NaN does not)."""
        return self.error <= self.tolerance and self.steps_error <= self.tolerance
