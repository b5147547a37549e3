"""Keys of the section `pipeline`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """How `parallel.pp` stages work together."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "1f1b"
    """Order of forwards and backwards. interleaved and zb-v place several stages on a rank; the zb-
    schedules fill waiting time with the weights' gradients."""
    chunks: int = 2
    """interleaved: stages per rank."""
    split: Literal["cost", "equal"] = "cost"
    """Layers of the stages: by modelled cost including the output head, or as even as possible."""
    speeds: list[float] = field(default_factory=list)
    """Relative speed of each stage's rank, for split=cost; empty: all alike."""
    swap_ends: bool = False
    """Odd microbatches visit the first two and the last two stages in swapped order, so that each of
    those stages has a twin which can replace it."""
    slices: int = 1
    """Slices of equal causal work in which each microbatch's tokens follow each other through the stages."""
