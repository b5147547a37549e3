"""Worlds that follow each other: a lost rank's state comes from a peer's memory."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore

from parallel import comm
from parallel.lost import says_lost

from .. import checkpoint
from ..build import Run, World
from ..config.check import parallel_config
from ..config.schema import Config
from ..errors import StateLost
from ..pulse import Pulse
from ..world import TIMEOUT_S
from .channel import Channel
from .fence import Fence
from .generations import DamagedError
from .keeper import Keeper
from .members import Restored, Row
from .memory import check_memory, usage
from .placement import Agreement, Inventory, agree, missing, shifts, twins
from .replicate import Memory, Replication
from .twins import compare_twins

REACH_S = 2.0
SAID = ("pid", "descriptor", "rss_mib")
"""What the event of a recovery lists of every rank; who stays must not grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process among the others, from its supervisor."""

    rank: int
    """Global rank."""
    local_rank: int
    """Rank on this node."""
    size: int
    """Ranks of the job."""
    local_size: int
    """Ranks of this node."""
    node: int
    """Index of the node."""
    attempt: int
    """How often torchrun has started the job before."""
    replaces: bool
    """Whether this process takes the place of a lost one."""


class Repaired:
    """Worlds that follow each other; a lost rank's state comes from a peer's memory."""

    def __init__(self, channel: Channel, pulse: Pulse, place: Place, memory: Memory) -> None:
        self.pulse, self.rank, self.replaces = pulse, place.rank, place.replaces
        self.restarted = False
        self._channel, self._place = channel, place
        self._memory, self._fence = memory, Fence()
        self._form: dict[str, Any] = {}
        self._store: TCPStore
        self._inventories: list[Inventory] = []
        self._agreement: Agreement | None = None
        self._replication: Replication | None = None
        self._keeper = Keeper(self._memory.own)
        self._reached = 0
        self._noticed = self._joined = self._formed = 0.0

    def form(self, config: Config) -> World:
        """Join, wait for everybody, agree on a step; no process group exists yet."""
        self.pulse("join")
        self._channel.fence_with(None)
        self._fence, self._joined = Fence(), time.time()
        if self.rank == 0:
            self._store = TCPStore(_host(), 0, is_master=True, wait_for_workers=False)
        self._form = self._channel.join(self._memory.inventory() | self._state() | usage())
        self._formed = time.time()
        self._inventories = [Inventory.of(state) for state in self._form["ranks"]]
        self._agreement = agree(self._inventories, self._twins(config))
        self.restarted = any(state["attempt"] for state in self._form["ranks"])
        self.pulse("connect")
        self._channel.fence_with(self._fence.cut, within_s=config.recovery.connect_s)
        if self.rank != 0:
            self._store = self._reach(self._form["ranks"][0]["store_port"], config.recovery.connect_s)
        self._store.set_timeout(timedelta(seconds=config.recovery.connect_s))
        place = self._place
        return World(
            rank=place.rank,
            size=place.size,
            device=_device(config, place.local_rank),
            store=self._store,
            epoch=self._form["epoch"],
            timeout_s=config.recovery.connect_s,
        )

    def _reach(self, port: int, limit_s: float) -> TCPStore:
        """The store of rank 0; if that rank is lost meanwhile, nobody waits for its port to open."""
        until = time.monotonic() + limit_s
        while True:
            try:
                patience = timedelta(seconds=REACH_S)
                return TCPStore(_host(), port, is_master=False, wait_for_workers=False, timeout=patience)
            except RuntimeError:
                if self._channel.fenced or time.monotonic() > until:
                    raise

    def _state(self) -> dict[str, Any]:
        """What the others are told of this rank when it joins."""
        store = {"store_port": self._store.port} if self.rank == 0 else {}
        return {"reached": self._reached, "pid": os.getpid(), "attempt": self._place.attempt} | store

    def known(self) -> Mapping[str, torch.Tensor] | None:
        """No shard at all: they come with the rest of the state."""
        return {} if self._agreement else None

    def restore(self, run: Run) -> Restored | None:
        """Transfer what lost ranks need, copy this rank's state into the run, replicate again.

        Raises:
            StateLost: no memory and no checkpoint has the state of all ranks.
        """
        config = run.config.recovery
        built = time.time()
        self._replicate(run)
        run.mesh.set_timeout(TIMEOUT_S)
        self._fence.opened()
        if self._form["first"] and self._agreement is None:
            check_memory(run, config, local_ranks=self._place.local_size)
            return None
        self.pulse("transfer")
        replication, agreement = self._replication, self._agreement
        assert replication is not None
        if agreement is None:
            return self._from_checkpoint(run)
        replication.fetch(agreement)
        row = self._keeper.restore(run, agreement.step)
        replication.replenish(agreement, self._inventories)
        return Restored(
            step=agreement.step,
            row=row,
            event=self._figures(built, agreement.step),
        )

    def begin(self, run: Run) -> None:
        """Remember the state before the first step, so that it can be gone back to; tell the supervisor."""
        if self._agreement is None:
            self._keep(run, row=None)
            assert self._replication is not None
            self._replication.wait()
        self._channel.running()

    def behind(self) -> bool:
        """Whether this rank still waits for what it keeps of the last generation."""
        return self._replication is not None and not self._replication.complete

    def keep(self, run: Run, row: Row, *, behind: bool) -> None:
        """Remember the state after a step, every `recovery.every` steps."""
        step, config = run.progress.step, run.config
        self._reached = step
        compare = config.recovery.compare_every
        if compare and step % compare == 0:
            compare_twins(run, step)
        if step % config.recovery.every and step != config.train.steps:
            return
        assert self._replication is not None
        if behind:
            self._replication.skipped += 1
            return
        self.pulse("keep")
        self._keep(run, row)

    def older(self, run: Run) -> bool:
        """Whether there is a state before the newest; a rank that has just replaced another has one alone."""
        count = torch.tensor([self._memory.own.count()], device=run.world.device)
        return int(comm.all_reduce(count, group=run.mesh.group("world"), op="min")) > 1

    def go_back(self, run: Run, *, further: bool) -> None:
        """Restore the newest state of all ranks, or the one before."""
        assert self._replication is not None
        self._replication.wait()
        self._keeper.go_back(run, further=further)
        for shelf in self._memory.held.values():
            shelf.drop_after(run.progress.step)

    def survives(self, error: BaseException) -> bool:
        """A lost peer is survived: wait until the supervisors agree that this world has ended."""
        self.pulse("unwind")
        self._noticed = time.time()
        if self._channel.fenced:
            return True
        if says_lost(error) or isinstance(error, DamagedError):
            self._channel.broken(error)
            return True
        return False

    def close(self) -> None:
        """End what belongs to the present world."""
        if self._replication is not None:
            self._replication.close()
        self._replication = None

    def fail(self, exit_code: int, error: str) -> None:
        """The supervisor tells it, once for all ranks."""
        self._channel.end(exit_code, error)

    def end(self, exit_code: int) -> bool:
        """Wait for all ranks; a loss meanwhile sends this one back."""
        if self._replication is not None and exit_code == 0:
            self._replication.wait()
        self.pulse("end")
        return self._channel.end(exit_code)

    def _replicate(self, run: Run) -> None:
        config, shape = run.config.recovery, parallel_config(run.config).shape
        copies = max(0, config.replicas - (shape[1] - 1))
        strike = self.pulse.strike
        self._replication = Replication(
            self._memory,
            run.mesh.host_group(),
            shifts(shape, node_ranks=self._place.local_size, replicas=copies),
            strike=(lambda step: strike(step, "replicate")) if strike else None,
        )
        self._keeper = Keeper(self._memory.own)

    def _keep(self, run: Run, row: Row | None) -> None:
        assert self._replication is not None
        self._replication.send(self._keeper.pack(run, row))

    def _from_checkpoint(self, run: Run) -> Restored:
        gone = missing(self._inventories, self._twins(run.config))
        found = checkpoint.resume(run, checkpoint.checkpoints_folder(run))
        if found is None:
            raise StateLost(
                f"the state of ranks {gone} is in no peer's memory, and there is no checkpoint to go back "
                "to; raise recovery.replicas or set checkpoint.every, and start again with a new run.dir"
            )
        self._memory.forget()  # newer states of some ranks would be taken for those of all
        event = self._figures(time.time(), run.progress.step) | {"checkpoint": str(found)}
        if self.rank == 0:
            print(f"the state of ranks {gone} is in no memory; going back to checkpoint {found}", flush=True)
        return Restored(step=run.progress.step, row=None, event=event)

    def _twins(self, config: Config) -> list[tuple[int, ...]]:
        shape = parallel_config(config).shape
        return [twins(shape, rank) for rank in range(self._place.size)]

    def _figures(self, built: float, step: int) -> Row:
        """Seconds of each part, on this rank; the clock is that of the node whose rank was lost."""
        now, lost = time.time(), self._form["lost"]
        deaths = [each["at"] for each in lost if each["at"] is not None]
        since = min(deaths, default=self._noticed or self._joined)
        noticed = self._noticed or None  # a process that takes another's place has noticed nothing
        return {
            "epoch": self._form["epoch"],
            "lost": lost,
            **{f"{name}s": [state[name] for state in self._form["ranks"]] for name in SAID},
            "step": step,
            "steps_redone": max(state["reached"] for state in self._form["ranks"]) - step,
            "detect_s": noticed and round(max(0.0, noticed - since), 4),
            "fence_s": noticed and round(self._joined - noticed, 4),
            "join_s": round(self._formed - self._joined, 4),
            "form_s": round(built - self._formed, 4),
            "transfer_s": round(now - built, 4),
            "resume_s": round(now - since, 4),
            "lost_at": since,
        }


def _host() -> str:
    """The first node, where rank 0 is. It keeps the store of its epoch.

    torchrun's own outlives the ranks and holds the addresses of the dead, and with torch 2.13 a node that
    takes another's place waits for it for ever.
    """
    return os.environ["MASTER_ADDR"]


def _device(config: Config, local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if config.run.device == "cuda" else torch.device("cpu")
