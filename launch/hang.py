"""Who waits for whom: the stacks that ranks write on SIGUSR2, read side by side.

A rank whose innermost frames are a collective waits for its peers; a rank that is elsewhere is whom
they wait for. Where all ranks are in collectives, those that differ from the most common call, or
have called it less deep in the program, are named.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

STACKS = "logs/stack_{rank}.txt"
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_WAITING = ("torch/distributed/", "parallel/comm.py")
_THREAD = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_MAIN = "Current thread"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the main thread of a rank stands."""

    waiting: bool
    """Inside a collective."""
    frame: str
    """First frame outside torch.distributed and parallel.comm: what it was doing."""
    call: str
    """The collective; empty where it is in none."""


def place(text: str) -> Place | None:
    """The last dump in a rank's file; None where there is none."""
    dumps = text.split(_MAIN)
    if len(dumps) < 2:
        return None
    frames = _FRAME.findall(_THREAD.split(dumps[-1])[0])
    if not frames:
        return None
    inner = list(takewhile(lambda frame: any(part in frame[0] for part in _WAITING), frames))
    path, line, function = frames[min(len(inner), len(frames) - 1)]
    return Place(
        waiting=bool(inner), frame=f"{path}:{line} in {function}", call=inner[-1][2] if inner else ""
    )


def read(folder: Path, world: int) -> dict[int, Place | None]:
    """The place of every rank of a run."""
    found: dict[int, Place | None] = {}
    for rank in range(world):
        path = folder / STACKS.format(rank=rank)
        found[rank] = place(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
    return found


def report(places: Mapping[int, Place | None]) -> list[str]:
    """One line a rank, and last who waits for whom."""
    lines = [f"rank {rank}: {_words(each)}" for rank, each in places.items()]
    silent = [rank for rank, each in places.items() if each is None]
    busy = [rank for rank, each in places.items() if each and not each.waiting]
    waiting = {rank: each for rank, each in places.items() if each and each.waiting}
    if silent or busy:
        blamed = f"rank {', '.join(map(str, [*silent, *busy]))}"
        return [*lines, f"rank {', '.join(map(str, waiting)) or 'none'} waits for {blamed}"]
    usual, _ = Counter((each.call, each.frame) for each in waiting.values()).most_common(1)[0]
    other = [rank for rank, each in waiting.items() if (each.call, each.frame) != usual]
    if other:
        return [
            *lines,
            f"the others are in {usual[0]} at {usual[1]}; rank {', '.join(map(str, other))} is not",
        ]
    return [
        *lines,
        "all ranks are in the same collective: the network between them, or a slow link, is to blame",
    ]


def _words(place: Place | None) -> str:
    if place is None:
        return "no answer: it is gone, or held inside native code"
    return f"waits in {place.call}, called at {place.frame}" if place.waiting else f"is at {place.frame}"
