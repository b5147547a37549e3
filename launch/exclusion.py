"""Nodes that failed preflight stay out of later starts of the same submission, if enough others are left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNFIT, EXCLUDE = "launch/unfit", "exclude"
FORMAT = "%N|%f|%G|%c|%m|%t"
"""What `sinfo --Node` is asked for: name, features, GRES, cores, memory, state."""
_USABLE = {"idle", "alloc", "mix", "comp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What Slurm could give to a later start."""

    asked: int
    """Nodes that the job asks for, spares among them."""
    nodes: Sequence[str]
    """Lines of `sinfo` in the form `FORMAT`, one for each node of the partition."""
    excluded: Sequence[str]
    """Nodes that the job excludes already."""


def remember(folder: Path, bad: Sequence[str]) -> list[str]:
    """Add nodes to those that have failed since the job was submitted; returns all of them."""
    known = failed(folder)
    new = [node for node in bad if node not in known]
    if new:
        with (folder / UNFIT).open("a", encoding="utf-8") as file:
            file.write("".join(f"{node}\n" for node in new))
    return [*known, *new]


def failed(folder: Path) -> list[str]:
    """Nodes that have failed preflight since the job was submitted."""
    path = folder / UNFIT
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def forget(folder: Path) -> None:
    """Begin a new submission: who repaired a node submits anew."""
    (folder / UNFIT).unlink(missing_ok=True)


def exclusion(unfit: Sequence[str], given: Sequence[str], choice: Choice) -> list[str]:
    """Everything that a later start should exclude; empty: leave the job as it is.

    A job that excluded too much would wait for ever. So another node counts only if it is up and of
    the same kind (features, GRES, cores, memory) as one that the job was given: whatever the job's own
    constraints say, it could have that one too.

    Args:
        unfit: nodes that failed.
        given: nodes of this allocation.
        choice: what there is.
    """
    kinds, names = {}, set()
    for line in choice.nodes:
        name, _, facts = line.strip().partition("|")
        kind, _, state = facts.rpartition("|")
        kinds[name] = kind
        if state in _USABLE:
            names.add(name)
    wanted = {kinds[node] for node in given if node in kinds}
    away = dict.fromkeys([*choice.excluded, *unfit])
    left = [name for name in names if kinds[name] in wanted and name not in away]
    new = [node for node in unfit if node not in choice.excluded]
    return list(away) if new and len(left) >= choice.asked else []
