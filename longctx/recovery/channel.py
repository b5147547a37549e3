"""This process among the others, as its supervisor tells it: rank, epochs, fences."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ..pulse import Pulse
from .lines import Lines, Message, SupervisorGoneError

BEAT_S = 0.25
CUT_EVERY_S = 0.05


class Channel:
    """The conversation with the supervisor; a thread listens, another sends heartbeats.

    If the supervisor dies, so does this process: torchrun then starts everything anew.
    """

    def __init__(self, descriptor: int, pulse: Pulse) -> None:
        self._lines = Lines(descriptor)
        self._pulse = pulse
        self._news = threading.Condition()
        self._assigned: Message | None = None
        self._form: Message | None = None
        self._cut: Callable[[], None] | None = None
        self._within_s = 0.0
        self._formed_epoch = -1
        self._over = False
        self.epoch = 0
        """Newest epoch that is known here."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"recovery-{work.__name__[1:]}", daemon=True).start()

    def warm(self) -> None:
        """Say that torch is imported."""
        self._lines.send(kind="warm")

    def assignment(self) -> Message:
        """Wait for a rank: rank, local_rank, size, local_size, node, attempt."""
        with self._news:
            self._news.wait_for(lambda: self._assigned is not None)
            assert self._assigned is not None
            return self._assigned

    def join(self, state: Any) -> Message:
        """Join the newest epoch and wait until it forms; a loss meanwhile means joining the next.

        Args:
            state: JSON that every rank gets of every other, as `ranks` of the answer.
        """
        while True:
            with self._news:
                epoch = self.epoch
            self._lines.send(kind="joined", epoch=epoch, state=state)
            with self._news:
                while self.epoch == epoch and self._form is None:
                    self._news.wait()
                form, self._form = self._form, None
                if form is not None and form["epoch"] == self.epoch:
                    self._formed_epoch = form["epoch"]
                    return form

    def fence_with(self, cut: Callable[[], None] | None, *, within_s: float = 0.0) -> None:
        """Call `cut` from another thread as soon as this epoch ends, again and again until the next call.

        If that does not come within `within_s` after the end, this process ends, and another takes its
        place: gloo may wait for ever for a send that it was given in the moment of the cut.
        """
        with self._news:
            self._cut, self._within_s = cut, within_s
            if self.fenced:  # already
                self._start_cutting()

    @property
    def fenced(self) -> bool:
        """Whether the epoch that has formed here has ended; false if none has."""
        return self.epoch > self._formed_epoch >= 0

    def broken(self, error: BaseException) -> None:
        """A connection failed; wait until the others know and this epoch ends."""
        words = (str(error).splitlines() or [type(error).__name__])[0]
        self._lines.send(kind="broken", epoch=self._formed_epoch, error=words)
        with self._news:
            self._news.wait_for(lambda: self.fenced or self._over)

    def running(self) -> None:
        """Say that steps are being computed."""
        self._lines.send(kind="running", epoch=self._formed_epoch)

    def failing(self, error: str) -> None:
        """Say why this process is about to end, so that it can be told to people."""
        self._lines.send(kind="failing", error=error)

    def end(self, exit_code: int, error: str = "") -> bool:
        """Say how this rank ends and wait for the others.

        Returns:
            Whether the job is over; if not, a rank was lost meanwhile and this one joins again.
        """
        self._lines.send(kind="ended", epoch=self._formed_epoch, exit_code=exit_code, error=error)
        with self._news:
            self._news.wait_for(lambda: self._over or self.fenced)
            return self._over

    def _listen(self) -> None:
        while True:
            try:
                messages = self._lines.receive()
            except SupervisorGoneError:
                os._exit(1)
            for message in messages:
                self._take(message)

    def _take(self, message: Message) -> None:
        with self._news:
            if message["kind"] == "assign":
                self._assigned, self.epoch = message, message["epoch"]
            elif message["kind"] == "form":
                self._form = message
            elif message["kind"] == "verdict":
                self._over = True
            elif message["kind"] == "fence" and message["epoch"] > self.epoch:
                self.epoch = message["epoch"]
                self._start_cutting()
            self._news.notify_all()

    def _start_cutting(self) -> None:
        if self._cut is not None:
            threading.Thread(target=self._keep_cutting, args=(self._cut,), daemon=True).start()

    def _keep_cutting(self, cut: Callable[[], None]) -> None:
        """Connections that are still being made when the first cut comes are cut by the next."""
        until = time.monotonic() + self._within_s
        while True:
            with self._news:  # `join` cannot begin in the middle of a cut
                if self._cut is not cut:
                    return
                cut()
                within_s = self._within_s
            if self._pulse.phase == "checkpoint":  # which may take its time
                until = time.monotonic() + within_s
            elif time.monotonic() > until:
                self.failing(f"it did not let go of a broken membership within {within_s:g} s")
                os._exit(1)
            time.sleep(CUT_EVERY_S)

    def _beat(self) -> None:
        while True:
            if self._assigned is not None:
                pulse = self._pulse
                beat = {"rank": self._assigned["rank"], "step": pulse.step, "phase": pulse.phase}
                self._lines.send(kind="beat", progress=pulse.progress, **beat)
            time.sleep(BEAT_S)
