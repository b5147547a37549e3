"""The one place where a strategy's name becomes functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ..comm import Group
from ..errors import ConfigError, UnsupportedError
from ..layout import SequenceLayout
from .allgather import GatherRoute
from .engine import Route
from .gather_plan import GatherPlan, gather_plan
from .mask import Mask
from .plan import Messages, Shares
from .ring import RingRoute
from .ring_plan import RingPlan, ring_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `make_attention` was asked for beside the strategy's name."""

    kernel: str
    """Kernel name or "auto"."""
    wire_dtype: torch.dtype | None
    """Dtype in which key and value gradients travel; None for at least float32."""
    inner_ring: int | None
    """Ranks of the ring that form one inner ring; None for a single ring."""


class Plan(Protocol):
    """What one rank does along the ring axis (pure)."""

    def messages(self) -> tuple[Messages, Messages]:
        """What is sent of keys in each pass, and of gradients in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to bring queries and keys together."""

    plan: Callable[[Shares, SequenceLayout, Options], Any]
    """Makes the `Plan` of the ring axis."""
    route: Callable[[Any, Group, Options], Route]
    """Carries such a plan out."""
    ring: bool
    """Whether it serves layout.ring > 1."""
    ulysses: bool
    """Whether it serves layout.ulysses > 1."""
    masks: frozenset[str] = frozenset(
        {"window", "min_distance", "sinks", "anchor", "group_shift", "block_stride"}
    )
    """Mask features that it computes exactly; others are refused."""


def _ring_plan(shares: Shares, layout: SequenceLayout, options: Options) -> RingPlan:
    return ring_plan(shares, layout.ring_rank, layout.ring, options.inner_ring or layout.ring)


def _ring_route(plan: RingPlan, group: Group, options: Options) -> Route:
    return RingRoute(plan=plan, group=group, wire_dtype=options.wire_dtype)


def _gather_plan(shares: Shares, layout: SequenceLayout, options: Options) -> GatherPlan:
    return gather_plan(shares, layout.ring_rank)


def _gather_route(plan: GatherPlan, group: Group, options: Options) -> Route:
    return GatherRoute(plan=plan, group=group, wire_dtype=options.wire_dtype)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "local": Strategy(plan=_ring_plan, route=_ring_route, ring=False, ulysses=False),
        "ulysses": Strategy(plan=_ring_plan, route=_ring_route, ring=False, ulysses=True),
        "ring": Strategy(plan=_ring_plan, route=_ring_route, ring=True, ulysses=False),
        "usp": Strategy(plan=_ring_plan, route=_ring_route, ring=True, ulysses=True),
        "allgather": Strategy(plan=_gather_plan, route=_gather_route, ring=True, ulysses=True),
    }
)
"""What `make_attention` knows; a new strategy is one more entry."""


def strategy(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"attention.strategy={name!r} is unknown; choose one of {list(STRATEGIES)}")
    return STRATEGIES[name]


def check_strategy(name: str, layout: SequenceLayout, mask: Mask) -> None:
    """Refuse what a strategy cannot compute exactly.

    Raises:
        UnsupportedError: naming the degree or the mask, and a strategy that can.
    """
    own = strategy(name)
    for axis, size, served in (("ring", layout.ring, own.ring), ("ulysses", layout.ulysses, own.ulysses)):
        if size > 1 and not served:
            able = [n for n, s in STRATEGIES.items() if getattr(s, axis)]
            raise UnsupportedError(
                f"attention.strategy={name!r} does not serve layout.{axis}={size}; "
                f"set parallel.{axis}=1, or choose one of {able}"
            )
    if layout.past:
        _check_slices(name, mask)
    for feature in mask.features():
        if feature not in own.masks:
            able = [n for n, s in STRATEGIES.items() if feature in s.masks]
            raise UnsupportedError(
                f"attention.strategy={name!r} does not compute mask {feature}={getattr(mask, feature)}; "
                f"choose one of {able}"
            )


def _check_slices(name: str, mask: Mask) -> None:
    """Keys of earlier slices are told apart by their positions in the document alone."""
    apart = sorted({"anchor", "group_shift", "block_stride"} & set(mask.features()))
    if apart or name == "allgather":
        what = f"mask {apart[0]}" if apart else f"attention.strategy={name!r}"
        raise UnsupportedError(f"{what} does not work on slices of a sequence; set pipeline.slices=1")
