"""Who takes part in a job, epoch by epoch: what the control server decides, without sockets or clocks.

An epoch is one membership. It forms when every rank has joined it; a lost rank or a broken
connection ends it, and the next begins. Source of the protocol: docs/recovery.md.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .lines import Message
from .protocol import DONE, FAILED, NO_PROGRESS, REQUEUE

BROKEN_GRACE_S = 0.05
"""A rank's death breaks its peers' connections, whose word may come first; one epoch for both."""
CONNECTIONS = -1
"""In the place of a rank: failures of connections alone."""
SILENCE_S = 30.0
"""After which a supervisor counts as gone though its connection stands: it was stopped, or hangs."""
ASLEEP_S = 2.0
"""A watcher that has not looked for longer was itself stopped, or starved, and judges nobody by that time."""
JOIN_S = 300.0
"""What the last rank of a membership has to import torch and join it, or longer: `Limits.hang_s`."""
ENDED_GRACE_S = 5.0
"""What the other ranks have to end by themselves once one has ended badly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When to give up."""

    failures: int = 3
    """Losses of one rank in a row without a new step between them."""
    hang_s: float = 600.0
    """Seconds without progress of any rank, after which the one furthest behind is killed."""


@dataclass(kw_only=True, slots=True)
class Membership:
    """The state of the job; every method takes the time and returns messages to all nodes."""

    size: int
    """Number of ranks."""
    limits: Limits = field(default_factory=Limits)
    """When to give up."""
    epoch: int = 0
    """The present membership."""
    formed: bool = False
    """Whether every rank has joined it."""
    _joined: dict[int, Message] = field(default_factory=dict)
    _lost: list[Message] = field(default_factory=list)
    _broken: tuple[float, Message] | None = None
    _ended: dict[int, Message] = field(default_factory=dict)
    _bad_end: tuple[float, Message] | None = None
    _progress: dict[int, tuple[int, int]] = field(default_factory=dict)
    _progress_at: float = 0.0
    _nodes: dict[int, tuple[float, Message]] = field(default_factory=dict)
    _ticked: float | None = None
    _best_step: int = -1
    _failures: Counter[int] = field(default_factory=Counter)
    _begun: set[int] = field(default_factory=set)
    _over: bool = False

    def handle(self, message: Message, now: float) -> list[Message]:
        """Take a message of a node or of one of its ranks."""
        takers: dict[str, Callable[[Message, float], list[Message]]] = {
            "joined": self._on_joined,
            "lost": self._on_lost,
            "broken": self._on_broken,
            "running": self._on_running,
            "ended": self._on_ended,
            "beats": self._on_beats,
            "node_lost": self._on_node_lost,
        }
        taker = takers.get(str(message.get("kind")))
        return [] if taker is None or self._over else taker(message, now)

    def tick(self, now: float) -> list[Message]:
        """What time alone decides; to be called every second."""
        if self._over:
            return []
        self._wake(now)
        if self._broken and now >= self._broken[0]:
            cause = self._broken[1]
            return self._next_epoch({"rank": cause["rank"], "how": cause["error"], "alive": True}, now)
        if self._bad_end and now >= self._bad_end[0]:
            return self._verdict(self._bad_end[1])
        silent = [hello for heard, hello in self._nodes.values() if now - heard > SILENCE_S]
        if silent:
            return self._without(silent[0], "the supervisor of node {} has been silent for too long")
        idle = now - self._progress_at
        if not self.formed and idle > max(JOIN_S, self.limits.hang_s):
            return self._kill_missing(now, idle)
        return self._kill_slowest(now) if self.formed and idle > self.limits.hang_s else []

    def _wake(self, now: float) -> None:
        asleep = 0.0 if self._ticked is None else now - self._ticked
        self._ticked = now
        if not self._progress_at:
            self._progress_at = now
        if asleep > ASLEEP_S:
            self._progress_at += asleep
            self._nodes = {node: (heard + asleep, hello) for node, (heard, hello) in self._nodes.items()}

    def wait_s(self, now: float) -> float:
        """Seconds until `tick` may have something to say."""
        deadlines = [now + 1.0]
        if self._broken:
            deadlines.append(self._broken[0])
        return max(0.0, min(deadlines) - now)

    def _on_joined(self, message: Message, now: float) -> list[Message]:
        if message["epoch"] != self.epoch or self.formed:
            return [self._fence()] if message["epoch"] < self.epoch else []
        self._joined[message["rank"]], self._progress_at = message, now
        if len(self._joined) < self.size:
            return []
        self.formed, first = True, len(self._begun) < self.size
        lost, self._lost = self._lost, []
        ranks = [self._joined[rank].get("state") for rank in range(self.size)]
        return [{"kind": "form", "epoch": self.epoch, "first": first, "lost": lost, "ranks": ranks}]

    def _on_running(self, message: Message, now: float) -> list[Message]:
        """A rank's first state is in its peers' memory; from then on nothing begins anew."""
        if message["epoch"] == self.epoch:
            self._begun.add(message["rank"])
        return []

    def _on_lost(self, message: Message, now: float) -> list[Message]:
        return self._next_epoch(message, now)

    def _on_broken(self, message: Message, now: float) -> list[Message]:
        if message["epoch"] == self.epoch and self._broken is None:
            self._broken = (now + BROKEN_GRACE_S, message)
        return []

    def _on_ended(self, message: Message, now: float) -> list[Message]:
        good = message["exit_code"] in (DONE, REQUEUE)
        if good and message.get("epoch", self.epoch) != self.epoch:  # it joins again, and ends again
            return []
        self._ended[message["rank"]] = message
        if message["exit_code"] != DONE and self._bad_end is None:
            self._bad_end = (now + ENDED_GRACE_S, message)
        if len(self._ended) < self.size:
            return []
        return self._verdict(self._bad_end[1] if self._bad_end else message)

    def _on_beats(self, message: Message, now: float) -> list[Message]:
        self._nodes[message["node"]] = now, message
        for rank, step, progress in message["ranks"]:
            if step < 0 and len(self._begun) < self.size:  # what comes before the first step may take hours
                continue
            if self._progress.get(rank) != (step, progress):
                self._progress[rank] = (step, progress)
                self._progress_at = now
            if step > self._best_step:
                self._best_step = step
                self._failures.clear()
        return []

    def _on_node_lost(self, message: Message, now: float) -> list[Message]:
        return self._without(message, "node {} is gone with all its ranks")

    def _without(self, node: Message, how: str) -> list[Message]:
        error = f"{how.format(node['node'])}; torchrun decides about a restart"
        end = {"exit_code": FAILED, "rank": node["first_rank"], "error": error}
        return self._verdict(end | {"restart": True})

    def _next_epoch(self, loss: Message, now: float) -> list[Message]:
        problem = self._too_often(loss)
        if problem:
            return self._verdict({"exit_code": NO_PROGRESS, "rank": loss["rank"], "error": problem})
        self.epoch += 1
        self.formed, self._broken, self._progress_at = False, None, now
        self._joined.clear()
        self._ended.clear()
        if self._bad_end and self._bad_end[1]["exit_code"] == REQUEUE:  # who was stopped says it again
            self._bad_end = None
        if len(self._begun) < self.size:
            self._begun.clear()
        self._progress.clear()
        self._lost.append({key: loss.get(key) for key in ("rank", "how", "at", "alive", "warm")})
        return [self._fence()]

    def _too_often(self, loss: Message) -> str | None:
        """Why the job does not go on. A rank's death may also show as a broken connection of any other."""
        rank, alive = loss["rank"], loss.get("alive", False)
        key, limit = (CONNECTIONS, 2 * self.limits.failures + 1) if alive else (rank, self.limits.failures)
        self._failures[key] += 1
        if self._failures[key] <= limit:
            return None
        who = f"connections of rank {rank}" if alive else f"rank {rank}"
        return (
            f"{who} failed {self._failures[key]} times in a row without a new step, at last "
            f"{loss['how']}; see logs/rank_{rank}.log (recovery.max_failures is the limit)"
        )

    def _fence(self) -> Message:
        return {"kind": "fence", "epoch": self.epoch}

    def _kill_missing(self, now: float, idle: float) -> list[Message]:
        rank = min(set(range(self.size)) - set(self._joined))
        self._progress_at = now
        why = f"it has not joined the others for {idle:.0f} s"
        return [{"kind": "kill", "rank": rank, "step": -1, "why": why}]

    def _kill_slowest(self, now: float) -> list[Message]:
        if not self._progress:
            return []
        rank, (step, _) = min(self._progress.items(), key=lambda item: (item[1], item[0]))
        self._progress_at = now
        why = f"no rank has made progress for {self.limits.hang_s:g} s and rank {rank} is furthest behind"
        return [{"kind": "kill", "rank": rank, "step": step, "why": why}]

    def _verdict(self, end: Message) -> list[Message]:
        self._over = True
        return [
            {"kind": "verdict"} | {key: end.get(key) for key in ("exit_code", "rank", "error", "restart")}
        ]
