"""`python -m launch supervise`: the trainers of one node, and a warm spare that replaces a lost one.

torchrun starts one process per rank. The first of a node becomes this supervisor, the others wait for
its verdict (`wait_for_verdict`). It starts the trainers, is told in milliseconds when one ends, kills
one whose heartbeat stops, and hands its rank to the spare. What all nodes must agree on is decided by
the control server; see docs/recovery.md.
"""

import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from .control import ControlServer, find, in_use
from .lines import ClosedError, Lines, Message
from .membership import ASLEEP_S, SILENCE_S, Limits, Membership
from .place import Place
from .protocol import BAD_INPUT, DONE, FAILED, REQUEUE, Status, write_status
from .trainer import Trainer, how_it_ended
from .verdict import VerdictServer

TICK_S = 0.25
START_S = 300.0
"""What a trainer has to import torch, during which it may hold the interpreter for long."""
LEAVE_S = 60.0
"""What a trainer has after the verdict to close its logs and leave."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the supervisor does."""

    program: tuple[str, ...]
    """Arguments of Python that start a trainer; the descriptor of its channel is inserted at `{}`."""
    folder: Path
    """Run folder, shared by all nodes."""
    spares: int = 1
    """Idle processes that have torch imported."""
    heartbeat_s: float = 10.0
    """Silence after which a trainer is killed."""
    limits: Limits = field(default_factory=Limits)
    """When the job gives up."""


class Supervisor:
    """One node's supervisor; `run` returns the job's exit code."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self._place, self._settings = place, settings
        self._selector = selectors.DefaultSelector()
        self._trainers: list[Trainer] = []
        self._epoch = 0
        self._verdict: Message | None = None
        self._begun = False
        self._heard = time.monotonic()  # the control server
        self._watched = 0.0
        self._signals = socket.socketpair()

    def run(self) -> int:
        """Supervise until the verdict."""
        self._take_signals()
        problem = in_use(self._settings.folder) if self._place.node == 0 else ""
        if problem:  # without a word in the status file, which is the other job's
            say(f"error: {problem}")
            return BAD_INPUT
        try:
            server = self._serve() if self._place.node == 0 else None
        except OSError as error:
            say(f"error: no file can be written in {self._settings.folder}: {error.strerror or error}")
            return BAD_INPUT
        verdicts = VerdictServer()
        try:
            self._control = find(
                self._settings.folder,
                job=self._place.job,
                node=self._place.node,
                first_rank=self._place.first_rank,
                timeout_s=60.0,
            )
            self._heard = time.monotonic()
            self._selector.register(self._control, selectors.EVENT_READ, self._on_control)
            for local in range(self._place.local_size):
                self._assign(self._start(), self._place.first_rank + local, replaces=False)
            verdict = self._loop()
        except ClosedError as error:
            verdict = self._gone(str(error))
        self._dismiss(verdict)
        if server:
            server.close()
        self._conclude(verdict)
        verdicts.tell(verdict["exit_code"])
        return int(verdict["exit_code"])

    def _serve(self) -> ControlServer:
        membership = Membership(size=self._place.size, limits=self._settings.limits)
        place = self._place
        return ControlServer(membership, host=place.host, job=place.job, folder=self._settings.folder)

    def _loop(self) -> Message:
        ticked = 0.0
        while self._verdict is None:
            for key, _ in self._selector.select(TICK_S):
                if self._verdict is None:
                    key.data()
            if time.monotonic() - ticked >= TICK_S:
                ticked = time.monotonic()
                self._watch(ticked)
        return self._verdict

    # Processes

    def _start(self) -> Trainer:
        ours, theirs = socket.socketpair()
        argv = [str(theirs.fileno()) if word == "{}" else word for word in self._settings.program]
        # In a group of its own: torchrun and terminals signal whole groups, and a stop goes through us.
        process = subprocess.Popen(
            [sys.executable, *argv], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
        )
        theirs.close()
        trainer = Trainer(process=process, lines=Lines(ours))
        self._trainers.append(trainer)
        self._selector.register(trainer.lines, selectors.EVENT_READ, lambda: self._on_trainer(trainer))
        return trainer

    def _assign(self, trainer: Trainer, rank: int, *, replaces: bool) -> None:
        place = self._place
        trainer.rank, trainer.heard = rank, time.monotonic()
        message = {"kind": "assign", "rank": rank, "local_rank": rank - place.first_rank}
        message |= {"size": place.size, "local_size": place.local_size, "node": place.node}
        message |= {"attempt": place.attempt, "epoch": self._epoch, "replaces": replaces}
        trainer.lines.send(message)

    def _reap(self) -> None:
        for trainer in list(self._trainers):
            code = trainer.process.poll()
            if code is not None:
                self._bury(trainer, code)

    def _bury(self, trainer: Trainer, code: int) -> None:
        with suppress(ClosedError):  # its last words
            while True:
                self._hear(trainer, trainer.lines.receive())
        with suppress(KeyError):
            self._selector.unregister(trainer.lines)
        trainer.lines.close()
        self._trainers.remove(trainer)
        if trainer.rank is None and trainer.warm and self._verdict is None:
            self._warm_spares()  # one that dies while it imports would die again
        if trainer.rank is None or self._verdict is not None:
            return
        spare = next((each for each in self._trainers if each.rank is None), None)
        loss = {"kind": "lost", "rank": trainer.rank, "how": how_it_ended(trainer, code), "at": time.time()}
        self._control.send(loss | {"warm": bool(spare and spare.warm)})
        successor = "a spare" if spare else "a new process"
        say(f"rank {trainer.rank} {loss['how']}; {successor} takes its place")
        self._assign(spare or self._start(), trainer.rank, replaces=True)

    def _watch(self, now: float) -> None:
        self._reap()
        asleep = now - self._watched - TICK_S if self._watched else 0.0
        self._watched = now
        if asleep > ASLEEP_S:  # this process did not run: what it has not heard says nothing
            self._heard += asleep
            for trainer in self._trainers:
                trainer.heard += asleep
        for trainer in self._trainers:
            limit = self._settings.heartbeat_s if trainer.warm else START_S
            silent = now - trainer.heard
            if trainer.rank is not None and not trainer.ended and silent > limit and not trainer.killed:
                self._kill(trainer, f"was silent for {silent:.1f} s (recovery.heartbeat_s={limit:g})")
        ranks = [[t.rank, *t.beat] for t in self._trainers if t.rank is not None]
        self._control.send({"kind": "beats", "ranks": ranks} | self._node())
        if now - self._heard > SILENCE_S:
            self._verdict = self._gone(
                "the first node's supervisor has been silent for too long; torchrun decides about a restart"
            )

    def _node(self) -> Message:
        return {"node": self._place.node, "first_rank": self._place.first_rank}

    def _kill(self, trainer: Trainer, why: str) -> None:
        trainer.killed = why
        with suppress(ProcessLookupError):
            trainer.process.kill()

    def _dismiss(self, verdict: Message) -> None:
        """Trainers that have reached the end leave by themselves; the others are killed."""
        for trainer in self._trainers:
            trainer.lines.send(verdict)
        deadline = time.monotonic() + LEAVE_S
        for trainer in self._trainers:
            if trainer.ended:
                with suppress(subprocess.TimeoutExpired):
                    trainer.process.wait(max(0.0, deadline - time.monotonic()))
            trainer.process.kill()
            trainer.process.wait()

    def _warm_spares(self) -> None:
        """Once everybody runs: importing torch beside a recovery would slow it."""
        for _ in range(self._settings.spares - sum(each.rank is None for each in self._trainers)):
            self._start()

    # Messages

    def _on_trainer(self, trainer: Trainer) -> None:
        if trainer not in self._trainers:  # its end was noticed in the same round
            return
        try:
            self._hear(trainer, trainer.lines.receive())
        except ClosedError:
            self._selector.unregister(trainer.lines)
            self._reap()

    def _hear(self, trainer: Trainer, messages: list[Message]) -> None:
        trainer.heard = time.monotonic()
        for message in messages:
            kind = message.get("kind")
            if kind == "beat":
                trainer.beat = (message["step"], message["progress"])
            elif kind == "warm":
                trainer.warm = True
            elif kind == "failing":
                trainer.error = message["error"]
            elif kind in ("joined", "running", "broken", "ended"):
                if kind == "running":
                    self._begun = True
                    self._warm_spares()
                trainer.ended = kind == "ended"
                self._control.send(message | {"rank": trainer.rank})

    def _on_control(self) -> None:
        try:
            messages = self._control.receive()
        except ClosedError:
            error = "the first node's supervisor is gone; torchrun decides about a restart"
            self._verdict = self._gone(error)
            return
        self._heard = time.monotonic()
        for message in messages:
            kind = message["kind"]
            if kind == "verdict":
                self._verdict = message
            elif kind == "kill":
                for trainer in self._trainers:
                    if trainer.rank == message["rank"]:
                        self._kill(trainer, f"was killed: {message['why']}")
            elif kind in ("form", "fence"):
                self._epoch = message["epoch"]
                for trainer in self._trainers:
                    if trainer.rank is not None:
                        trainer.lines.send(message)

    def _gone(self, error: str) -> Message:
        first = self._place.first_rank
        return {"kind": "verdict", "exit_code": FAILED, "rank": first, "error": error, "restart": True}

    # Signals

    def _take_signals(self) -> None:
        """Signals arrive as bytes of a socket, one each, so that the loop never polls."""
        for end in self._signals:
            end.setblocking(False)
        signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, _noted)
        self._selector.register(self._signals[0], selectors.EVENT_READ, self._on_signals)

    def _on_signals(self) -> None:
        if any(number in FORWARDED for number in self._signals[0].recv(4096)):
            if not self._begun:
                say("stopped before the first step; nothing was saved")
            for trainer in self._trainers:
                self._stop(trainer)
        self._reap()

    def _stop(self, trainer: Trainer) -> None:
        """Have a rank finish its step and save; one that has not begun could only die of the signal."""
        if trainer.rank is None or trainer.process.poll() is not None:
            return
        if self._begun:
            trainer.process.send_signal(signal.SIGTERM)
        else:
            self._control.send({"kind": "ended", "rank": trainer.rank, "exit_code": REQUEUE, "error": ""})

    def _conclude(self, verdict: Message) -> None:
        """The job's last word, told once; none where torchrun may start it again."""
        if verdict.get("restart"):
            say(f"error: {verdict['error']}")
            return
        status = Status(
            exit_code=int(verdict["exit_code"]), rank=int(verdict["rank"] or 0), error=verdict["error"] or ""
        )
        if self._place.node != 0:
            return
        try:
            first = write_status(self._settings.folder / "status.json", status)
        except OSError as error:
            say(f"error: {self._settings.folder / 'status.json'} could not be written: {error.strerror}")
            first = True
        if first and status.exit_code not in (DONE, REQUEUE) and status.error:
            say(f"error: {status.error}")


def say(text: str) -> None:
    """A line to the user, beside what the trainers print."""
    print(text, file=sys.stderr, flush=True)


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up byte says it all; without a handler the signal would kill this process."""
