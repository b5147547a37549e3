"""What torchrun's report says about the worker that failed first."""

import re
import signal
from dataclasses import dataclass

_ROOT = re.compile(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)


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
    match = _ROOT.search(report)
    return Failure(rank=int(match.group(1)), exit_code=int(match.group(2))) if match else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
