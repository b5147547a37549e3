"""What torchrun's report says about the worker that failed first."""

import re
import signal
from dataclasses import dataclass

_WORKER = re.compile(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)
_ROOT_CAUSE = "Root Cause"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A worker that ended badly."""

    rank: int
    """Rank of the worker."""
    exit_code: int
    """Its exit code; negative: the signal that killed it."""

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"rank {self.rank} failed first, with exit code {self.exit_code}"
        name = _signal_name(-self.exit_code)
        hint = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} died first, killed by {name}{hint}"


def first_failure(report: str) -> Failure | None:
    """The root cause in torchrun's messages, None where they do not hold one."""
    _, found, rest = report.partition(_ROOT_CAUSE)
    failures = _failures(rest) if found else []
    return failures[0] if failures else None


def killed_worker(report: str) -> Failure | None:
    """A worker that a signal killed, other than the SIGTERM by which torchrun ends the rest.

    Such a worker could not say anything; what its peers say about a lost peer is an echo.
    """
    dead = (each for each in _failures(report) if each.exit_code not in (-signal.SIGTERM, 0))
    return next((each for each in dead if each.exit_code < 0), None)


def _failures(report: str) -> list[Failure]:
    return [Failure(rank=int(rank), exit_code=int(code)) for rank, code in _WORKER.findall(report)]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
