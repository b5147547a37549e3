"""Which key rows go round a ring, when, and how their gradients come home (pure).

R ring ranks, of which `inner` consecutive ones form an inner ring (inside a node) and R / inner
inner rings an outer one; inner = R is the plain ring. At step (o, i) the rank (a, b) computes with
the keys of rank (a - o, b - i). A block goes on along its inner ring after each step, and to the
next inner ring as soon as a round starts, so that the slow link has a whole round's time
(LoongTrain's double ring). Gradients follow the order of computation and end at their owner.
"""

from dataclasses import dataclass
from functools import cache

from ..errors import ConfigError
from .plan import Messages, Shares, Step, block_step, own_step
from .tiles import Ranges, count, union, within


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Key rows sent and received together, started before a step's computation."""

    target: int
    """Step that computes with what is received."""
    send_to: int
    """Ring rank."""
    send: Ranges
    """Rows of the block held now; empty if nothing is sent."""
    receive_from: int
    """Ring rank."""
    receive: int
    """Rows received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientHop:
    """What happens to a travelling gradient block after a step's computation."""

    into: Ranges
    """Rows of the travelling block that the step's key rows are, in order."""
    send_to: int
    """Ring rank that computes with the same keys next, or their owner."""
    send: int
    """Rows of the travelling block."""
    receive_from: int
    """Ring rank that sends the next travelling block."""
    receive: int
    """Its rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RingPlan:
    """Everything one rank does in one pass round the ring."""

    steps: tuple[Step, ...]
    """Computations, the rank's own keys first."""
    transfers: tuple[tuple[Transfer, ...], ...]
    """Per step, what starts before it is computed."""
    hops: tuple[GradientHop, ...]
    """Per step, what happens to gradients after it."""
    seen: Ranges
    """This rank's rows that other ranks see."""

    def messages(self) -> tuple[Messages, Messages]:
        """What is sent of keys in each pass, and of gradients in the backward pass."""
        transfers = [transfer for started in self.transfers for transfer in started]
        hops = [hop for hop in self.hops if hop.send or hop.receive]
        return (
            Messages(len(transfers), sum(count(transfer.send) for transfer in transfers)),
            Messages(len(hops), sum(hop.send for hop in hops)),
        )


def check_inner(ring: int, inner: int) -> None:
    """Refuse an inner ring that does not divide the ring."""
    if inner < 1 or ring % inner:
        choices = [d for d in range(1, ring + 1) if ring % d == 0]
        raise ConfigError(f"inner_ring={inner} must divide layout.ring={ring}; choose one of {choices}")


def ring_plan(shares: Shares, rank: int, ring: int, inner: int) -> RingPlan:
    """The plan of one rank."""
    route = _Route(shares, ring, inner)
    steps, hops = [], []
    for number in range(ring):
        origin = route.origin(rank, number)
        held = route.carried(origin, number)
        steps.append(block_step(shares, rank, origin, held) if number else own_step(shares, rank))
        travelling = route.seen(origin)
        following = route.origin(rank, number + 1)
        hops.append(
            GradientHop(
                into=within(held, travelling) if number else (),
                send_to=route.holder(origin, number + 1),
                send=count(travelling),
                receive_from=route.holder(following, number),
                receive=count(route.seen(following)),
            )
        )
    return RingPlan(
        steps=tuple(steps),
        transfers=tuple(tuple(route.transfers(rank, number)) for number in range(ring)),
        hops=tuple(hops),
        seen=route.seen(rank),
    )


class _Route:
    """Who holds which keys at which step, and which rows of them."""

    def __init__(self, shares: Shares, ring: int, inner: int) -> None:
        self._shares, self._ring, self._inner, self._outer = shares, ring, inner, ring // inner
        self.carried = cache(self._carried)
        self._needs = cache(shares.needs)

    def origin(self, rank: int, step: int) -> int:
        """Whose keys `rank` computes with at `step`; after the last step its own come back."""
        return self._shift(rank, -1, step)

    def holder(self, origin: int, step: int) -> int:
        """Who computes with the keys of `origin` at `step`; after the last step their owner."""
        return self._shift(origin, 1, step)

    def _shift(self, rank: int, sign: int, step: int) -> int:
        (a, b), (o, i) = divmod(rank, self._inner), divmod(step % self._ring, self._inner)
        return (a + sign * o) % self._outer * self._inner + (b + sign * i) % self._inner

    def seen(self, origin: int) -> Ranges:
        """Rows of `origin` that any other rank computes with."""
        later = (self._needs(self.holder(origin, step), origin) for step in range(1, self._ring))
        return union(r for ranges in later for r in ranges)

    def _carried(self, origin: int, step: int) -> Ranges:
        """Rows of `origin` that its holder at `step` or a rank it passes them on to computes with."""
        if step == 0:
            return ((0, self._shares.rows[origin]),) if self._shares.rows[origin] else ()
        outer, inner = divmod(step, self._inner)
        last = (outer + 1) * self._inner if inner else self._ring
        later = (self._needs(self.holder(origin, s), origin) for s in range(step, last))
        return union(r for ranges in later for r in ranges)

    def transfers(self, rank: int, step: int) -> list[Transfer]:
        """What `rank` sends of the block it holds at `step`, with what it receives meanwhile."""
        outer, inner = divmod(step, self._inner)
        targets = [step + self._inner] if inner == 0 and outer + 1 < self._outer else []
        targets += [step + 1] if inner + 1 < self._inner else []
        found = []
        origin = self.origin(rank, step)
        for target in targets:
            coming = self.origin(rank, target)
            transfer = Transfer(
                target=target,
                send_to=self.holder(origin, target),
                send=within(self.carried(origin, target), self.carried(origin, step)),
                receive_from=self.holder(coming, step),
                receive=count(self.carried(coming, target)),
            )
            found += [transfer] if transfer.send or transfer.receive else []
        return found
