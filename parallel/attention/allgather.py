"""Attention with all needed keys fetched at once, and their gradients sent back and added.

Each rank fetches exactly the key rows that its queries see, computes with its own keys meanwhile,
then with the fetched ones sorted by document: one rectangle per query chunk.

Cost: forward one exchange of (R - 1) 2 t K D elements sent for one document cut evenly over R ranks,
backward the same again and the gradients likewise; nothing for documents that are whole on a
rank. The fetched keys of one layer are in memory while it is computed.

Source: Llama 3 (section 3.3.2, context parallelism), with per-document slices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..comm import Group, exchange
from .gather_plan import GatherPlan
from .plan import GRADIENTS, KEYS, Step
from .rows import add_rows, pack
from .tiles import count

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRoute:
    """Own keys, then all others' at once."""

    plan: GatherPlan
    """What to send, receive and compute."""
    group: Group
    """The ring ranks."""
    wire_dtype: torch.dtype | None = None
    """Dtype in which gradients travel; None for the dtype in which they are added."""
    cache: dict[torch.device, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)
    """Sorting of fetched rows by device."""

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Two steps: own keys, fetched keys."""
        plan = self.plan
        messages = {rows: pack(k, v, rows) for _, rows in plan.sends}
        arriving = [(peer, k.new_empty(2, rows, *k.shape[1:])) for peer, rows in plan.receives]
        pending = exchange(
            [(peer, messages[rows]) for peer, rows in plan.sends], arriving, self.group, kind=KEYS
        )
        yield plan.own, k, v
        pending.wait()
        if arriving:
            fetched = arriving[0][1] if len(arriving) == 1 else torch.cat([b for _, b in arriving], 1)
            order, _ = self.orders(k.device)
            fetched = fetched if order is None else fetched.index_select(1, order)
            yield plan.remote, fetched[0], fetched[1]

    def orders(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The sorting of fetched rows and its inverse; None when they arrive sorted."""
        if device not in self.cache:
            order = torch.from_numpy(self.plan.order)
            sorted_already = torch.equal(order, torch.arange(len(order)))
            pair = (None, None) if sorted_already else (order.to(device), order.argsort().to(device))
            self.cache[device] = pair
        return self.cache[device]

    def gradients(self, k: Tensor) -> "GatherGradients":
        """Send each owner what its rows got here, add what came from the others."""
        return GatherGradients(self, k)


class GatherGradients:
    """dK and dV of own rows, and of fetched rows on their way back to their owners."""

    def __init__(self, route: GatherRoute, k: Tensor) -> None:
        self._route = route
        self._exact = torch.promote_types(k.dtype, torch.float32)
        self._wire = route.wire_dtype or self._exact
        self._own: tuple[Tensor, Tensor] | None = None
        self._row = k.shape[1:]
        self._parts: tuple[Tensor, ...] = ()

    def put(self, dk: Tensor, dv: Tensor) -> None:
        """Own gradients first, then those of the fetched rows."""
        if self._own is None:
            self._own = dk.to(self._exact), dv.to(self._exact)
            return
        plan = self._route.plan
        _, inverse = self._route.orders(dk.device)
        rows = torch.stack((dk, dv))
        rows = (rows if inverse is None else rows.index_select(1, inverse)).to(self._wire)
        self._parts = tuple(part.contiguous() for part in rows.split([n for _, n in plan.receives], 1))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Exchange and add, in rank order."""
        assert self._own is not None
        plan = self._route.plan
        sends = [(peer, part) for (peer, _), part in zip(plan.receives, self._parts, strict=True)]
        like = self._own[0]
        arriving = [
            (peer, like.new_empty(2, count(rows), *self._row, dtype=self._wire)) for peer, rows in plan.sends
        ]
        exchange(sends, arriving, self._route.group, kind=GRADIENTS).wait()
        for (_, rows), (_, block) in zip(plan.sends, arriving, strict=True):
            for own, part in zip(self._own, block, strict=True):
                add_rows(own, part, rows)
        return self._own
