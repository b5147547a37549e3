"""Attention with keys and values passed round a ring of ranks, and their gradients passed home.

The next block travels while this one is computed with. Blocks hold only rows that a rank further
on computes with, in one message of K and V. Gradients are added in at least float32 and travel in
the wire dtype.

Cost: forward R - 1 sends of 2 t K D elements for one document cut evenly over R ranks, backward
again R - 1 and R of gradients; nothing for documents that are whole on a rank. Two blocks are in
memory whatever R is (three in a double ring).

Source: Ring Attention with Blockwise Transformers (Liu et al.); LoongTrain (double ring).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..comm import Group, Pending, exchange
from .plan import GRADIENTS, KEYS, Step
from .ring_plan import GradientHop, RingPlan, Transfer
from .rows import add_rows, pack

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRoute:
    """Keys arrive from the ring, one origin per step."""

    plan: RingPlan
    """What to send, receive and compute."""
    group: Group
    """The ring."""
    wire_dtype: torch.dtype | None = None
    """Dtype in which gradients travel; None for the dtype in which they are added."""

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Own keys first, then each origin's rows as they arrive."""
        inbox: dict[int, tuple[Tensor, Pending]] = {}
        held = None
        for number, step in enumerate(self.plan.steps):
            if number in inbox:
                held, pending = inbox.pop(number)
                pending.wait()
                k, v = held[0], held[1]
            elif number:
                k, v = k[:0], v[:0]
            for transfer in self.plan.transfers[number]:
                inbox[transfer.target] = self._start(transfer, k, v, held)
            yield step, k, v

    def _start(self, transfer: Transfer, k: Tensor, v: Tensor, held: Tensor | None) -> tuple[Tensor, Pending]:
        sends = []
        if transfer.send:
            whole = held is not None and transfer.send == ((0, held.shape[1]),)
            sends.append(
                (transfer.send_to, held if whole and held is not None else pack(k, v, transfer.send))
            )
        block = k.new_empty(2, transfer.receive, *k.shape[1:])
        receives = [(transfer.receive_from, block)] if transfer.receive else []
        return block, exchange(sends, receives, self.group, kind=KEYS, step=transfer.target)

    def gradients(self, k: Tensor) -> "RingGradients":
        """Collect the travelling gradients of every origin in turn."""
        exact = torch.promote_types(k.dtype, torch.float32)
        return RingGradients(self.plan, self.group, self.wire_dtype or exact)


class RingGradients:
    """dK and dV on their way home: received, added to, sent on."""

    def __init__(self, plan: RingPlan, group: Group, wire: torch.dtype) -> None:
        self._plan, self._group, self._wire = plan, group, wire
        self._number = 0
        self._own: tuple[Tensor, Tensor] | None = None
        self._arriving: tuple[Tensor, Pending] | None = None

    def put(self, dk: Tensor, dv: Tensor) -> None:
        """Add the step's gradients to the block that travels, and pass it on."""
        hop = self._plan.hops[self._number]
        if self._number == 0:
            exact = torch.promote_types(dk.dtype, torch.float32)
            self._own = dk.to(exact), dv.to(exact)
            block = pack(*self._own, self._plan.seen)
        else:
            block = self._arrived().to(torch.promote_types(dk.dtype, torch.float32))
            add_rows(block[0], dk, hop.into)
            add_rows(block[1], dv, hop.into)
        self._pass_on(hop, block.to(self._wire))
        self._number += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of this rank's own keys."""
        assert self._own is not None
        block = self._arrived()
        first = 0
        for start, stop in self._plan.seen:
            for own, home in zip(self._own, block, strict=True):
                own[start:stop] = home[first : first + stop - start]
            first += stop - start
        return self._own

    def _arrived(self) -> Tensor:
        assert self._arriving is not None
        block, pending = self._arriving
        pending.wait()
        return block

    def _pass_on(self, hop: GradientHop, block: Tensor) -> None:
        sends = [(hop.send_to, block)] if hop.send else []
        coming = block.new_empty(2, hop.receive, *block.shape[2:])
        receives = [(hop.receive_from, coming)] if hop.receive else []
        self._arriving = coming, exchange(sends, receives, self._group, kind=GRADIENTS, step=self._number)
