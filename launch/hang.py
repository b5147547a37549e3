"""Who waits for whom: what ranks write on SIGUSR2, their stacks and their last calls, read side by side.

A rank whose innermost frames are a collective waits for its peers; a rank that is elsewhere is whom
they wait for. Where all ranks are in collectives, those that differ from the most common call, or
have called it less deep in the program, are named. The calls, from torch's flight recorder, say by how
much a rank is behind on a process group, or that it made another call than its peers.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

STACKS, CALLS = "logs/stack_{rank}.txt", "logs/calls_{rank}.json"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The newest call of a rank on a process group."""

    group: str
    """Name of the group."""
    ranks: tuple[int, ...]
    """Its members; empty: unknown."""
    number: int
    """How many collectives the rank has begun there."""
    what: str
    """Name and sizes."""
    done: bool
    """Whether it has ended."""


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


def calls(folder: Path, world: int) -> dict[int, list[Call]]:
    """The newest calls of every rank that has told them."""
    found = {}
    for rank in range(world):
        try:
            raw = json.loads((folder / CALLS.format(rank=rank)).read_text(encoding="utf-8"))
            found[rank] = [_call(each) for each in raw]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _call(raw: Mapping[str, Any]) -> Call:
    return Call(
        group=str(raw["group"]),
        ranks=tuple(raw["ranks"]),
        number=int(raw["number"]),
        what=f"{raw['call']} of {raw['sizes']}",
        done=bool(raw["done"]),
    )


def unequal(found: Mapping[int, list[Call]]) -> list[str]:
    """One line for each process group on which somebody waits and the members' last calls differ."""
    groups: dict[str, dict[int, Call]] = {}
    for rank, each in found.items():
        for call in each:
            groups.setdefault(call.group, {})[rank] = call
    return [line for group, members in sorted(groups.items()) for line in _behind(group, members)]


def _behind(group: str, members: Mapping[int, Call]) -> list[str]:
    if all(call.done for call in members.values()):
        return []
    ahead = max(members.values(), key=lambda call: call.number)
    where = f"group {group} (ranks {', '.join(map(str, ahead.ranks)) or 'unknown'})"
    late = {rank: call for rank, call in members.items() if call.number < ahead.number}
    if late:
        words = [f"rank {rank} has got to {call.number}, {call.what}" for rank, call in late.items()]
        return [f"{where} waits in collective {ahead.number}, {ahead.what}; {'; '.join(words)}"]
    usual, _ = Counter(call.what for call in members.values()).most_common(1)[0]
    other = [f"rank {rank} calls {call.what}" for rank, call in members.items() if call.what != usual]
    return [f"{where}: collective {ahead.number} is {usual}, but {'; '.join(other)}"] if other else []


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
