"""Run a schedule on paper: who computes when, how long ranks wait, whether it ends (pure).

A computation starts when its rank is free and what it needs has arrived; sends and receives take no
time of the rank. Messages between two ranks must be received in the order in which they are sent.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from ..errors import PlanError
from .actions import FORWARD, UPSTREAM, Action, Message, Schedule, gives, message_of, needs

_EVERY = ("forward", "input", "weight")
_RESULTS: dict[str, tuple[str, ...]] = {
    "backward": ("input", "weight"),
    "backward_input": ("input",),
    "backward_weight": ("weight",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Time of each kind of computation, in any unit."""

    forward: float = 1.0
    """One stage forward; a rank with several stages has as many shorter ones."""
    backward_input: float = 1.0
    """Gradient of a stage's input."""
    backward_weight: float = 1.0
    """Gradient of a stage's parameters."""
    embed: float = 0.0
    """The embedding, each way."""
    head: float = 0.0
    """The head, each way."""
    transfer: float = 0.0
    """A message on its way; ranks go on meanwhile."""

    def of(self, action: Action, part: object) -> float:
        """Time of a computation on a part."""
        if part == "embed":
            return self.embed
        if part == "head":
            return self.head
        if action.kind == "forward":
            return self.forward
        both = {"backward": self.backward_input + self.backward_weight}
        return both.get(action.kind, getattr(self, action.kind, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A computation in time."""

    action: Action
    """What is computed."""
    start: float
    """When it starts."""
    stop: float
    """When it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happens when."""

    spans: tuple[tuple[Span, ...], ...]
    """Per rank, its computations in order."""
    in_flight: tuple[int, ...]
    """Per rank, the most stage inputs that are kept for backward at one time."""

    @property
    def makespan(self) -> float:
        """Time of the step."""
        return max((span.stop for own in self.spans for span in own), default=0.0)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        busy = sum(span.stop - span.start for own in self.spans for span in own)
        return 1 - busy / (len(self.spans) * self.makespan) if self.makespan else 0.0


def simulate(
    schedule: Schedule,
    durations: Durations = Durations(),
    *,
    weigh: Callable[[Action], float] = lambda action: 1.0,
) -> Timeline:
    """Execute the action lists.

    Args:
        schedule: the lists.
        durations: time of each kind.
        weigh: factor on a computation's time (microbatches and slices differ).

    Raises:
        PlanError: the ranks wait for each other for ever, a message is received in another order
            than it is sent, or something is computed twice or never.
    """
    _check_messages(schedule)
    _check_complete(schedule)
    ready: dict[Message, float] = {}
    done: dict[tuple[int, int, int, str], float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.lists]
    place = [0] * len(schedule.lists)
    clock = [0.0] * len(schedule.lists)
    routes = {m: schedule.placement.route(m) for m in range(schedule.microbatches)}
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(schedule.lists):
            while place[rank] < len(own):
                action = own[place[rank]]
                if action.kind not in ("send", "receive"):
                    route = routes[action.microbatch]
                    begin = _begin(action, route, ready, done, durations.transfer)
                    if begin is None:
                        break
                    start = max(clock[rank], begin)
                    stop = start + durations.of(action, route[action.hop].part) * weigh(action)
                    clock[rank] = stop
                    spans[rank].append(Span(action=action, start=start, stop=stop))
                    done[action.microbatch, action.slice, action.hop, action.kind] = stop
                    given = gives(action, route)
                    if given is not None:
                        ready[given] = stop
                place[rank] += 1
                moved = True
    _check_ended(schedule, place)
    flights = tuple(_in_flight(schedule, rank) for rank in range(len(schedule.lists)))
    return Timeline(spans=tuple(map(tuple, spans)), in_flight=flights)


def _begin(
    action: Action,
    route: tuple[object, ...],
    ready: dict[Message, float],
    done: dict[tuple[int, int, int, str], float],
    transfer: float,
) -> float | None:
    """When everything that a computation needs is there; None: not yet known."""
    times = [0.0]
    message = needs(action, route)  # type: ignore[arg-type]
    if message is not None:
        if message not in ready:
            return None
        source = route[message[2]].rank  # type: ignore[attr-defined]
        times.append(ready[message] + transfer * (source != route[action.hop].rank))  # type: ignore[attr-defined]
    where = action.microbatch, action.slice, action.hop
    if action.kind not in FORWARD:
        earlier = ["backward_input"] if action.kind == "backward_weight" else list(FORWARD)
        known = [done[*where, kind] for kind in earlier if (*where, kind) in done]
        if not known:
            return None
        times += known
    for step, kinds in _neighbour_slices(action):
        found = [done.get((action.microbatch, step, action.hop, kind)) for kind in kinds]
        known = [time for time in found if time is not None]
        if not known:
            return None
        times += known
    return max(times)


def _neighbour_slices(action: Action) -> list[tuple[int, tuple[str, ...]]]:
    """A slice needs the keys of the one before it; its backward is checked by order (`_check_slices`)."""
    if action.kind == "forward" and action.slice:
        return [(action.slice - 1, ("forward",))]
    return []


def _check_messages(schedule: Schedule) -> None:
    sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
    received: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for rank, own in enumerate(schedule.lists):
        for action in own:
            if action.kind == "send" and action.peer is not None:
                sent[rank, action.peer].append(message_of(action))
            if action.kind == "receive" and action.peer is not None:
                received[action.peer, rank].append(message_of(action))
    for pair in sent.keys() | received.keys():
        if sent[pair] != received[pair]:
            raise PlanError(
                f"schedule {schedule.name}: rank {pair[1]} receives from rank {pair[0]} in another order "
                "than it sends"
            )


def _check_complete(schedule: Schedule) -> None:
    """Every hop is computed once each way, in each gradient; slices go back in reverse."""
    counts: dict[tuple[int, int, int, str], int] = defaultdict(int)
    for rank, own in enumerate(schedule.lists):
        computing = [a for a in own if a.kind not in ("send", "receive")]
        _check_slices(schedule, computing)
        for action in computing:
            if schedule.hop(action).rank != rank:
                raise PlanError(f"schedule {schedule.name}: {action} is not of rank {rank}")
            for result in _RESULTS.get(action.kind, ("forward",)):
                counts[action.microbatch, action.slice, action.hop, result] += 1
    hops = [
        (m, hop) for m in range(schedule.microbatches) for hop in range(schedule.placement.num_stages + 2)
    ]
    for (microbatch, hop), part, result in product(hops, range(schedule.slices), _EVERY):
        number = counts[microbatch, part, hop, result]
        if number != 1:
            raise PlanError(
                f"schedule {schedule.name}: {result} of microbatch {microbatch}, slice {part}, hop "
                f"{hop} is computed {number} times"
            )


def _check_slices(schedule: Schedule, computing: list[Action]) -> None:
    last: dict[tuple[int, int], int] = {}
    for action in computing:
        if action.kind in UPSTREAM and schedule.hop(action).part not in ("embed", "head"):
            key = action.microbatch, action.hop
            if action.slice != last.get(key, schedule.slices) - 1:
                raise PlanError(f"schedule {schedule.name}: {action} before the slices behind it")
            last[key] = action.slice


def _check_ended(schedule: Schedule, place: list[int]) -> None:
    stuck = [
        f"rank {rank} before {own[place[rank]]}"
        for rank, own in enumerate(schedule.lists)
        if place[rank] < len(own)
    ]
    if stuck:
        raise PlanError(f"schedule {schedule.name} never ends: {'; '.join(stuck)}")


def _in_flight(schedule: Schedule, rank: int) -> int:
    """A split backward keeps its stage's input until the weights' gradient is there."""
    kept = most = 0
    for action in schedule.lists[rank]:
        kept += (action.kind == "forward") - (
            action.kind in ("backward", "backward_weight")
            and schedule.hop(action).part not in ("embed", "head")
        )
        most = max(most, kept)
    return most
