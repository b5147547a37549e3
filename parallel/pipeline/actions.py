"""The actions of a schedule, and the messages between ranks that they need (pure)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .routes import Hop, Placement

Kind = Literal["embed", "forward", "head", "backward", "backward_input", "backward_weight", "send", "receive"]
FORWARD: frozenset[Kind] = frozenset({"embed", "forward", "head"})
"""Kinds that compute a part's output."""
UPSTREAM: frozenset[Kind] = frozenset({"backward", "backward_input"})
"""Kinds that compute the gradient of a part's input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One entry of a rank's list."""

    kind: Kind
    """What is done. "backward" is both gradients at once. "send" and "receive" move the output of
    hop `hop`, or with `gradient` the gradient of its input."""
    microbatch: int
    """Which microbatch."""
    hop: int
    """Position in the microbatch's route; 0 is the embedding."""
    slice: int = 0
    """Which slice of the microbatch's tokens."""
    peer: int | None = None
    """send, receive: the other rank."""
    gradient: bool = False
    """send, receive: whether a gradient travels."""


Message = tuple[int, int, int, bool]
"""(microbatch, slice, hop, gradient): what a send and its receive have in common."""
Lists = tuple[tuple[Action, ...], ...]
"""Actions of each rank in order."""


def message_of(action: Action) -> Message:
    """What an action sends or receives."""
    return action.microbatch, action.slice, action.hop, action.gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Everything all ranks do in one step."""

    name: str
    """Name in the registry."""
    placement: Placement
    """Where the parts are."""
    microbatches: int
    """Number of microbatches."""
    slices: int
    """Slices of each microbatch."""
    lists: Lists
    """Actions of each rank."""

    def hop(self, action: Action) -> Hop:
        """Where and on which part a computing action happens."""
        return self.placement.route(action.microbatch)[action.hop]


def needs(action: Action, route: Sequence[Hop]) -> Message | None:
    """The value from another hop that a computation waits for; None: nothing, or a local backward."""
    if action.kind in FORWARD:
        return None if action.hop == 0 else (action.microbatch, action.slice, action.hop - 1, False)
    if action.kind in UPSTREAM and action.hop + 1 < len(route):
        return action.microbatch, action.slice, action.hop + 1, True
    return None


def gives(action: Action, route: Sequence[Hop]) -> Message | None:
    """The value that a computation makes for another hop."""
    if action.kind in FORWARD and action.hop + 1 < len(route):
        return action.microbatch, action.slice, action.hop, False
    if action.kind in UPSTREAM and action.hop > 0:
        return action.microbatch, action.slice, action.hop, True
    return None


def with_messages(computations: Lists, placement: Placement) -> Lists:
    """Add sends behind, and receives ahead of, the computations that need them.

    A receive is posted one computation early, so that the transfer overlaps it, and all receives from
    one rank are in that rank's order of sending: then messages need no tags on any backend.
    """
    routes = {a.microbatch: placement.route(a.microbatch) for own in computations for a in own}
    sends = [[_send(a, routes[a.microbatch], rank) for a in own] for rank, own in enumerate(computations)]
    order: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, leaving in enumerate(sends):
        for send in leaving:
            if send is not None and send.peer is not None:
                order[rank, send.peer].append(send)
    lists = []
    for rank, own in enumerate(computations):
        coming = {peer: sent for (peer, target), sent in order.items() if target == rank}
        before = _receives(own, rank, routes, coming)
        lists.append(_interleave(own, before, sends[rank]))
    return tuple(lists)


def _send(action: Action, route: Sequence[Hop], rank: int) -> Action | None:
    message = gives(action, route)
    if message is None:
        return None
    microbatch, part, hop, gradient = message
    peer = route[hop - 1].rank if gradient else route[hop + 1].rank
    if peer == rank:
        return None
    return Action(kind="send", microbatch=microbatch, slice=part, hop=hop, gradient=gradient, peer=peer)


def _receives(
    own: Sequence[Action],
    rank: int,
    routes: dict[int, tuple[Hop, ...]],
    coming: dict[int, list[Action]],
) -> list[list[Action]]:
    """Per computation the receives that are posted in front of it; `coming` is sent, by rank."""
    before: list[list[Action]] = [[] for _ in own]
    posted = dict.fromkeys(coming, 0)
    places = {message_of(send): i + 1 for sent in coming.values() for i, send in enumerate(sent)}
    for index, action in enumerate(own):
        message = needs(action, routes[action.microbatch])
        if message is None:
            continue
        peer = routes[action.microbatch][message[2]].rank
        if peer == rank:
            continue
        place = places[message]
        for send in coming[peer][posted[peer] : place]:
            receive = Action(
                kind="receive",
                microbatch=send.microbatch,
                slice=send.slice,
                hop=send.hop,
                gradient=send.gradient,
                peer=peer,
            )
            before[max(0, index - 1)].append(receive)
        posted[peer] = max(posted[peer], place)
    return before


def _interleave(
    own: Sequence[Action], before: list[list[Action]], sends: Sequence[Action | None]
) -> tuple[Action, ...]:
    found: list[Action] = []
    for action, receives, send in zip(own, before, sends, strict=True):
        found += [*receives, action, *([send] if send is not None else [])]
    return tuple(found)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of a schedule, in its order."""
    kept = tuple(tuple(a for a in own if a.kind in FORWARD) for own in schedule.lists)
    return replace(schedule, lists=with_messages(kept, schedule.placement))
