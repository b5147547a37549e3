"""The one place where a schedule's name becomes action lists (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..errors import ConfigError
from .actions import Schedule, with_messages
from .greedy import greedy
from .orders import Entry, expand, gpipe, interleaved, one_f_one_b
from .routes import Placement, folded, looped
from .split_orders import zb_h1, zb_v


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a pipeline was asked for; fixed for a run."""

    name: str = "1f1b"
    """Name in `SCHEDULES`."""
    ranks: int
    """Ranks on the pp axis."""
    chunks: int = 2
    """Stages per rank, for schedules that leave the choice."""
    slices: int = 1
    """Slices of each microbatch's tokens."""
    swap_ends: bool = False
    """Odd microbatches visit the first two and the last two stages in swapped order."""

    def placement(self) -> Placement:
        """Where the parts of the model live."""
        return SCHEDULES[self.name].place(self)

    def plain(self) -> "Spec":
        """For forwards alone: whole microbatches, through the layers in the model's order."""
        return replace(self, slices=1, swap_ends=False)

    @property
    def splits_backward(self) -> bool:
        """Whether weights' gradients are computed apart from the inputs'."""
        return SCHEDULES[self.name].split


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a schedule's name stands for."""

    order: Callable[[Spec, int], Sequence[Sequence[Entry]]]
    """Per rank the computations of so many microbatches."""
    place: Callable[[Spec], Placement]
    """Where stages live."""
    split: bool = False
    """Whether backward is split."""
    straight: bool = False
    """One stage per rank, backward in one: it serves slices and swapped ends."""
    bubble: Callable[[Spec, int], float] | None = None
    """Share of the time that ranks wait, where a formula gives it: all stages alike, backward twice
    forward, nothing else."""


def _in_order(spec: Spec) -> Placement:
    return Placement(stage_ranks=tuple(range(spec.ranks)), swap_ends=spec.swap_ends)


def _gpipe(spec: Spec, microbatches: int) -> Sequence[Sequence[Entry]]:
    if not spec.swap_ends:
        return gpipe(spec.ranks, microbatches, spec.slices)
    found = greedy(_in_order(spec), microbatches, admitted=microbatches, priority=_forward_first)
    return [sorted(own, key=lambda entry: entry.kind != "forward") for own in found]  # a stable sort


def _one_f_one_b(spec: Spec, microbatches: int) -> Sequence[Sequence[Entry]]:
    if not spec.swap_ends:
        return one_f_one_b(spec.ranks, microbatches, spec.slices)
    return greedy(_in_order(spec), microbatches, admitted=spec.ranks + 1, priority=_backward_first)


def _forward_first(entry: Entry) -> tuple[int, ...]:
    return entry.kind != "forward", entry.unit[0], entry.hop


def _backward_first(entry: Entry) -> tuple[int, ...]:
    return entry.kind == "forward", -entry.hop, entry.unit[0]


def _plain_bubble(spec: Spec, microbatches: int) -> float:
    """Slices fill the pipeline as microbatches do."""
    return (spec.ranks - 1) / (microbatches * spec.slices + spec.ranks - 1)


def _interleaved_bubble(spec: Spec, microbatches: int) -> float:
    return (spec.ranks - 1) / (microbatches * spec.chunks + spec.ranks - 1)


def _h1_bubble(spec: Spec, microbatches: int) -> float:
    idle = max(spec.ranks - 1, 2 * (spec.ranks - 1) - (microbatches - 1))
    return idle / (3 * microbatches + idle)


def _v_bubble(spec: Spec, microbatches: int) -> float:
    idle = max(spec.ranks - 1, 4 * (spec.ranks - 1) - 2 * (microbatches - 1))
    return idle / (6 * microbatches + idle)


SCHEDULES: Mapping[str, Family] = MappingProxyType(
    {
        "gpipe": Family(place=_in_order, order=_gpipe, straight=True, bubble=_plain_bubble),
        "1f1b": Family(place=_in_order, order=_one_f_one_b, straight=True, bubble=_plain_bubble),
        "interleaved": Family(
            place=lambda spec: looped(spec.ranks, spec.chunks),
            order=lambda spec, microbatches: interleaved(spec.ranks, microbatches, spec.chunks),
            bubble=_interleaved_bubble,
        ),
        "zb-h1": Family(
            place=_in_order,
            order=lambda spec, microbatches: zb_h1(spec.ranks, microbatches),
            split=True,
            bubble=_h1_bubble,
        ),
        "zb-v": Family(
            place=lambda spec: folded(spec.ranks),
            order=lambda spec, microbatches: zb_v(spec.ranks, microbatches),
            split=True,
            bubble=_v_bubble,
        ),
    }
)
"""What `make_schedule` knows."""


def make_schedule(spec: Spec, microbatches: int) -> Schedule:
    """The action lists of one step."""
    placement = spec.placement()
    computations = expand(SCHEDULES[spec.name].order(spec, microbatches), placement)
    return Schedule(
        name=spec.name,
        placement=placement,
        microbatches=microbatches,
        slices=spec.slices,
        lists=with_messages(computations, placement),
    )


def bubble(spec: Spec, microbatches: int) -> float | None:
    """The formula's share of waiting; None where there is none.

    Interleaved: exact where the ranks divide the microbatches. Swapped ends have no formula.
    """
    formula = SCHEDULES[spec.name].bubble
    if formula is None or spec.swap_ends or (spec.name == "interleaved" and microbatches % spec.ranks):
        return None
    return formula(spec, microbatches)


def check_spec(spec: Spec, num_layers: int) -> None:
    """Refuse what a schedule does not do.

    Raises:
        ConfigError: naming the key and what to set.
    """
    if spec.name not in SCHEDULES:
        raise ConfigError(f"pipeline.schedule={spec.name!r} is unknown; choose one of {list(SCHEDULES)}")
    if spec.chunks < 1 or spec.slices < 1:
        raise ConfigError(
            f"pipeline.chunks={spec.chunks} and pipeline.slices={spec.slices}; choose at least 1"
        )
    able = [name for name, family in SCHEDULES.items() if family.straight]
    if spec.slices > 1 and spec.name not in able:
        raise ConfigError(
            f"pipeline.slices={spec.slices} works with pipeline.schedule {' or '.join(able)}, not "
            f"{spec.name}; choose one of them, or pipeline.slices=1"
        )
    if spec.swap_ends:
        _check_swap(spec, num_layers, able)


def _check_swap(spec: Spec, num_layers: int, able: list[str]) -> None:
    reasons = {
        f"pipeline.schedule={spec.name}; choose {' or '.join(able)}": spec.name not in able,
        f"parallel.pp={spec.ranks}; choose at least 4": spec.ranks < 4,
        f"pipeline.slices={spec.slices}; choose 1": spec.slices > 1,
        f"parallel.pp={spec.ranks} does not divide model.num_layers={num_layers}, and swapped stages must "
        "have equally many layers; choose a divisor": num_layers % spec.ranks != 0,
    }
    for reason, wrong in reasons.items():
        if wrong:
            raise ConfigError(f"pipeline.swap_ends=true does not work with {reason}")
