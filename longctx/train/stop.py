"""A polite stop: SIGTERM and SIGUSR1 finish the step, save, and end with exit code 64."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop was asked for; the loop looks at it once per step."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether this rank was asked; ranks agree through the step's all-reduce."""
        return self.name is not None

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
