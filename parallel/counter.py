"""Counting communication, so that it can be compared with what was planned."""

from collections import Counter as Tally
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counter:
    """Calls made and bytes sent by this rank, by kind of communication."""

    calls: Tally[str] = field(default_factory=Tally)
    """Number of communications started, by kind."""
    sent_bytes: Tally[str] = field(default_factory=Tally)
    """Bytes sent to other ranks, by kind; what a rank keeps for itself does not count."""

    def add(self, kind: str, sent: int) -> None:
        """Count one call of `kind` that sends `sent` bytes."""
        self.calls[kind] += 1
        self.sent_bytes[kind] += sent

    def reset(self) -> None:
        """Start again from zero."""
        self.calls.clear()
        self.sent_bytes.clear()
