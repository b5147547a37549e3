"""Progress of a preparation: a bar on a terminal, plain lines elsewhere, both on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_PLAIN_EVERY_S = 5.0
_MIB = 2.0**20


class Progress(Protocol):
    """Something that takes the number of bytes that were just finished."""

    def __call__(self, advance: int) -> None:
        """Count bytes."""


@contextmanager
def open_progress(what: str, total: int, *, show: bool) -> Iterator[Progress]:
    """Show how far some work is.

    Args:
        what: a few words.
        total: bytes of all of it.
        show: False: count silently.
    """
    if not show:
        yield lambda advance: None
    elif sys.stderr.isatty():
        yield from _bar(what, total)
    else:
        yield _Lines(what, total)


def _bar(what: str, total: int) -> Iterator[Progress]:
    from rich.console import Console  # 60 ms that silent calls do not need
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda advance: bar.advance(task, advance)


class _Lines:
    """A line every few seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._shown = time.monotonic()

    def __call__(self, advance: int) -> None:
        """Count bytes."""
        self._done += advance
        now = time.monotonic()
        if now - self._shown < _PLAIN_EVERY_S and self._done < self._total:
            return
        self._shown = now
        rate = self._done / _MIB / max(1e-9, now - self._started)
        share = self._done / max(1, self._total)
        print(
            f"{self._what}: {self._done / _MIB:,.1f} of {self._total / _MIB:,.1f} MiB ({share:.0%}), "
            f"{rate:,.1f} MiB/s",
            file=sys.stderr,
            flush=True,
        )
