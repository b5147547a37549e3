"""Faults that a rehearsal asks for, struck by the process itself at the exact point.

A plan is a JSON list of `Fault`s. Each strikes once in the life of a run: before it does, it leaves a
mark in the folder of the plan, which the process that takes its place finds.
"""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ConfigError
from ..pulse import PHASES
from .fence import cut_everything
from .generations import Shelf

KINDS = (
    "kill",
    "stop",
    "exception",
    "hang",
    "exit",
    "supervisor",
    "drop",
    "corrupt",
)
"""SIGKILL; SIGSTOP; a Python error; a hang that holds the interpreter; exit(0); SIGKILL of the
supervisor; all connections cut; a flipped byte in the states that are held for other ranks."""


ANY_STEP = -2
STRUCK = PHASES[1:]
"""Phases of a trainer at work; none strikes while it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault of a plan."""

    step: int
    """Optimizer step at work, counted from 0; `ANY_STEP` for faults during a recovery."""
    rank: int
    """Who."""
    phase: str
    """One of `STRUCK`."""
    kind: str = "kill"
    """One of `KINDS`."""
    after_s: float = 0.0
    """Seconds from there; another thread strikes then, wherever the rank is."""

    def check(self, size: int, steps: int) -> None:
        """Refuse what can never strike.

        Args:
            size: ranks of the run.
            steps: its optimizer steps.

        Raises:
            ConfigError: naming the field.
        """
        if self.phase not in STRUCK:
            raise ConfigError(f"phase {self.phase!r} is unknown; choose one of {', '.join(STRUCK)}")
        if self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if not 0 <= self.rank < size:
            raise ConfigError(f"rank {self.rank} is not one of 0 to {size - 1}")
        if self.step != ANY_STEP and not 0 <= self.step < steps:
            raise ConfigError(f"step {self.step} is not one of 0 to {steps - 1} (train.steps={steps}), nor *")


def write_plan(faults: Sequence[Fault], path: Path) -> None:
    """Write a plan for `Faults.read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=1))


class InjectedError(RuntimeError):
    """The error of a rehearsal."""


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: Sequence[tuple[int, Fault]], folder: Path) -> None:
        self._waiting = list(faults)
        self._folder = folder
        self.held: dict[int, Shelf] = {}
        """What `corrupt` damages."""

    @classmethod
    def read(cls, path: str, *, rank: int) -> "Faults":
        """The faults of a plan that concern a rank and have not struck yet."""
        entries = [Fault(**entry) for entry in json.loads(Path(path).read_text())]
        folder = Path(path).parent
        mine = [
            (number, fault)
            for number, fault in enumerate(entries)
            if fault.rank == rank and not _mark(folder, number).exists()
        ]
        return cls(mine, folder)

    def strike(self, step: int, phase: str) -> None:
        """Strike if it is time."""
        for entry in list(self._waiting):
            number, fault = entry
            if fault.phase == phase and fault.step in (step, ANY_STEP):
                self._waiting.remove(entry)
                if fault.after_s:
                    threading.Timer(fault.after_s, self._do, (number, fault)).start()
                else:
                    self._do(number, fault)

    def _do(self, number: int, fault: Fault) -> None:
        mark = _mark(self._folder, number)
        with mark.open("x") as file:
            json.dump(asdict(fault) | {"time": time.time(), "pid": os.getpid()}, file)
        _KINDS[fault.kind](self)


def _mark(folder: Path, number: int) -> Path:
    return folder / f"struck-{number}.json"


def _kill(faults: Faults) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(faults: Faults) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _exception(faults: Faults) -> None:
    raise InjectedError("an error of the rehearsal")


def _hang(faults: Faults) -> None:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock


def _exit(faults: Faults) -> None:
    os._exit(0)


def _supervisor(faults: Faults) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # this process dies with its parent


def _drop(faults: Faults) -> None:
    cut_everything()


def _corrupt(faults: Faults) -> None:
    for shelf in faults.held.values():
        for slot in shelf.slots:
            if slot.used:
                slot.buffer[slot.used // 2] ^= 1


_KINDS = {
    "kill": _kill,
    "stop": _stop,
    "exception": _exception,
    "hang": _hang,
    "exit": _exit,
    "supervisor": _supervisor,
    "drop": _drop,
    "corrupt": _corrupt,
}
