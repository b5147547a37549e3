"""Executing a schedule: computations on this rank, transfers beside them.

Shapes: [n, E] the stream of n rows of this rank between parts; no shape is ever sent, since every
rank knows it from the step's plan. Activations and gradients travel as this rank's rows, which tp
and the sequence axes have already divided.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import fsdp
from ..comm import Group, Pending, exchange
from ..mesh import Mesh
from .actions import FORWARD, UPSTREAM, Action, Message, Schedule, forward_only, gives, message_of, needs
from .deferred import Deferred
from .routes import Hop, Part
from .schedule import Spec, make_schedule

KIND = "pipeline"
"""Label of the transfers in `comm.Counter`."""


class Work(Protocol):
    """What the parts compute; given by the model's owner, anew for every step."""

    def run(self, parts: tuple[Part, ...], x: Tensor | None, microbatch: int, piece: int) -> Tensor:
        """Output [n, E] of parts for one slice of a microbatch; of the head the summed loss, a scalar.

        The parts are one stage, the embedding with the first stage, or the head. `x` is the stream [n, E];
        None for the embedding.
        """

    def rows(self, microbatch: int, piece: int) -> int:
        """Rows n of the stream on this rank."""

    def flush(self) -> Tensor:
        """A scalar, zero, that every parameter of this rank reaches: computed without any token."""


@dataclass(kw_only=True, slots=True)
class Pipeline:
    """This rank's part in a pipeline, for the life of a run."""

    spec: Spec
    """Which schedule."""
    mesh: Mesh
    """The world."""
    width: int
    """E, channels of the stream."""
    dtype: torch.dtype
    """Of the stream."""
    device: torch.device
    """Where it lives."""
    deferred: Deferred | None = None
    """Collects what a split backward leaves for later; None: backward is not split."""
    _links: dict[tuple[int, int], Group] = field(init=False, repr=False)
    _schedules: dict[tuple[int, bool], Schedule] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Connect to the neighbours; every rank of the world does it together.

        On GPUs each direction has a communicator of its own: NCCL runs one communicator's messages one
        after the other, and two ranks that both send first would wait for each other.
        """
        self._links = {}
        for pair in self.spec.placement().links() if self.device.type == "cuda" else ():
            group = self.mesh.subgroup("pp", (min(pair), max(pair)))
            if group is not None:
                self._links[pair] = group

    def link(self, sender: int, receiver: int) -> Group:
        """The group in which one rank of the pp axis sends to another."""
        return self._links.get((sender, receiver), self.mesh.group("pp"))

    def backward(self, model: nn.Module, work: Work, microbatches: int) -> None:
        """Forward and backward of a step; gradients end reduced and summed in `.grad`.

        Args:
            model: this rank's parts under one FSDP root, through which `work` calls them.
            work: the computations.
            microbatches: how many; equal on all ranks.

        Raises:
            PeerLost: a neighbour died, or was silent for the timeout.
        """
        _Execution(self, self.schedule(microbatches), work, model).run()

    def forward(self, work: Work, microbatches: int) -> None:
        """The forwards alone, whole microbatches, without gradients; what the head computes, `work` keeps."""
        _Execution(self, self.schedule(microbatches, forward=True), work, None).run()

    def schedule(self, microbatches: int, *, forward: bool = False) -> Schedule:
        """The action lists for so many microbatches, made once."""
        key = microbatches, forward
        if key not in self._schedules:
            made = make_schedule(self.spec.plain() if forward else self.spec, microbatches)
            self._schedules[key] = forward_only(made) if forward else made
        return self._schedules[key]


class _Execution:
    """One step under way."""

    def __init__(self, pipeline: Pipeline, schedule: Schedule, work: Work, model: nn.Module | None) -> None:
        self._pipeline, self._work, self._model = pipeline, work, model
        self._rank = pipeline.mesh.coordinate("pp")
        self._actions = schedule.lists[self._rank]
        backwards = [a for a in self._actions if a.kind in UPSTREAM and a.hop > 0]
        self._last = backwards[-1] if backwards and pipeline.deferred is None else None
        self._routes = [schedule.placement.route(m) for m in range(schedule.microbatches)]
        self._kept: dict[tuple[int, int, int], tuple[Tensor | None, Tensor]] = {}
        self._values: dict[Message, Tensor] = {}
        self._arriving: dict[Message, tuple[Tensor, Pending]] = {}
        self._leaving: deque[Pending] = deque()
        self._weights: dict[tuple[int, int, int], list[Callable[[], None]]] = {}

    def run(self) -> None:
        """Execute this rank's actions, then finish what is under way."""
        if self._model is not None:
            fsdp.set_last_backward(self._model, False)
        for action in self._actions:
            if action.kind == "receive":
                self._receive(action)
            elif action.kind == "send":
                self._send(action)
            elif action.kind in FORWARD:
                self._forward(action, self._routes[action.microbatch])
            elif action.kind == "backward_weight":
                for gradient in self._weights.pop(_place(action)):
                    gradient()
            else:
                self._backward(action, self._routes[action.microbatch])
        for pending in self._leaving:
            pending.wait()
        if self._model is not None:
            self._reduce(self._model)

    def _reduce(self, model: nn.Module) -> None:
        if self._pipeline.deferred is not None:
            # Weights' gradients come outside of any backward: one without tokens reduces them all.
            fsdp.set_last_backward(model, True)
            self._work.flush().backward()
        # Parts that the last backward did not touch are still gathered; the optimizer would
        # update their shards and the next forward use the stale copy.
        fsdp.reshard(model)

    def _receive(self, action: Action) -> None:
        assert action.peer is not None, "a receive has a peer"
        pipeline = self._pipeline
        rows = self._work.rows(action.microbatch, action.slice)
        buffer = torch.empty(rows, pipeline.width, dtype=pipeline.dtype, device=pipeline.device)
        link = pipeline.link(action.peer, self._rank)
        pending = exchange(
            [],
            [(_index(link, action.peer, self._rank), buffer)] if rows else [],
            link,
            kind=KIND,
            step=action.microbatch,
        )
        self._arriving[message_of(action)] = buffer, pending

    def _send(self, action: Action) -> None:
        assert action.peer is not None, "a send has a peer"
        value = self._values.pop(message_of(action)).contiguous()
        link = self._pipeline.link(self._rank, action.peer)
        sends = [(_index(link, action.peer, self._rank), value)] if value.numel() else []
        while self._leaving and self._leaving[0].done():
            self._leaving.popleft()
        self._leaving.append(exchange(sends, [], link, kind=KIND, step=action.microbatch))

    def _take(self, message: Message) -> Tensor:
        """A value made on this rank, or received."""
        if message in self._values:
            return self._values.pop(message)
        buffer, pending = self._arriving.pop(message)
        pending.wait()
        return buffer

    def _forward(self, action: Action, route: tuple[Hop, ...]) -> None:
        if action.kind == "embed":
            return  # computed in one with the stage behind it, which is on the same rank
        first = action.hop == 1
        message = None if first else needs(action, route)
        x = None if message is None else self._take(message)
        keeps = self._model is not None
        if x is not None and keeps:
            x.requires_grad_(True)
        parts = tuple(hop.part for hop in (route[:2] if first else route[action.hop : action.hop + 1]))
        y = self._work.run(parts, x, action.microbatch, action.slice)
        given = gives(action, route)
        if given is not None:
            self._values[given] = y.detach()
        if keeps:
            self._kept[_place(action)] = x, y

    def _backward(self, action: Action, route: tuple[Hop, ...]) -> None:
        assert self._model is not None, "a forward-only schedule has no backward"
        if action.hop == 0:
            return  # has gone back with the stage behind it
        message = needs(action, route)
        gradient = None if message is None else self._take(message)
        x, y = self._kept.pop(_place(action))
        if action is self._last:
            fsdp.set_last_backward(self._model, True)
        if action.kind == "backward_input" and self._pipeline.deferred is not None:
            with self._pipeline.deferred.collecting() as weights:
                torch.autograd.backward(y, gradient)
            self._weights[_place(action)] = weights
        else:
            torch.autograd.backward(y, gradient)
        given = gives(action, route)
        if given is not None and x is not None:
            assert x.grad is not None, "backward reaches the input of its part"
            self._values[given] = x.grad


def _place(action: Action) -> tuple[int, int, int]:
    return action.microbatch, action.slice, action.hop


def _index(link: Group, peer: int, rank: int) -> int:
    """Index of a rank of the pp axis in a group of two, which is ascending, or in that of the axis."""
    return int(peer > rank) if link.size == 2 else peer
