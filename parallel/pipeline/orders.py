"""In which order each rank computes, for schedules that have a formula (pure).

F forward and B backward of a stage; a unit is one slice of one microbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .actions import Action, Kind, Lists
from .routes import Placement

Unit = tuple[int, int]
"""(microbatch, slice)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One computation on a stage; what happens at the model's ends follows from it."""

    kind: Literal["forward", "backward", "backward_input", "backward_weight"]
    unit: Unit
    hop: int
    """Position among the microbatch's stages, from 1."""


def forward_units(microbatches: int, slices: int) -> list[Unit]:
    """Units in the order of their forwards."""
    return [(m, s) for m in range(microbatches) for s in range(slices)]


def backward_units(microbatches: int, slices: int) -> list[Unit]:
    """Units in the order of their backwards: a slice's keys are done when all later ones are."""
    return [(m, s) for m in range(microbatches) for s in reversed(range(slices))]


def gpipe(ranks: int, microbatches: int, slices: int) -> list[list[Entry]]:
    """All forwards, then all backwards.

    Source: GPipe (Huang et al. 2019); slices: TeraPipe (Li et al. 2021).
    """
    ahead, back = forward_units(microbatches, slices), backward_units(microbatches, slices)
    return [
        [Entry("forward", u, rank + 1) for u in ahead] + [Entry("backward", u, rank + 1) for u in back]
        for rank in range(ranks)
    ]


def one_f_one_b(ranks: int, microbatches: int, slices: int) -> list[list[Entry]]:
    """As many forwards as it takes for the first backward to come back, then one of each in turn.

    Source: PipeDream-Flush (Narayanan et al. 2021); slices: Seq1F1B (Sun et al. 2024).
    """
    ahead, back = forward_units(microbatches, slices), backward_units(microbatches, slices)
    return [
        alternate(
            [Entry("forward", u, rank + 1) for u in ahead],
            [Entry("backward", u, rank + 1) for u in back],
            warmup=ranks - rank - 1 + slices - 1,
        )
        for rank in range(ranks)
    ]


def interleaved(ranks: int, microbatches: int, chunks: int) -> list[list[Entry]]:
    """1F1B over `chunks` stages per rank: microbatches go in groups of one for each rank.

    A last group that is not full is ordered as if it were.

    Source: Megatron-LM (Narayanan et al. 2021), sec. 2.2.
    """
    whole = -(-microbatches // ranks) * ranks
    lists = []
    for rank in range(ranks):
        ahead, back = [], []
        for index in range(whole * chunks):
            group, inside = divmod(index, ranks * chunks)
            chunk, member = divmod(inside, ranks)
            unit = group * ranks + member, 0
            ahead.append(Entry("forward", unit, chunk * ranks + rank + 1))
            back.append(Entry("backward", unit, (chunks - 1 - chunk) * ranks + rank + 1))
        warmup = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        entries = alternate(ahead, back, warmup=warmup)
        lists.append([entry for entry in entries if entry.unit[0] < microbatches])
    return lists


def alternate(ahead: Sequence[Entry], back: Sequence[Entry], *, warmup: int) -> list[Entry]:
    """`warmup` forwards, then forward and backward in turn, then the remaining backwards."""
    warmup = min(warmup, len(ahead))
    steady = [entry for pair in zip(ahead[warmup:], back, strict=False) for entry in pair]
    return [*ahead[:warmup], *steady, *back[len(ahead) - warmup :]]


def expand(entries: Sequence[Sequence[Entry]], placement: Placement) -> Lists:
    """Add the embedding and the head where routes begin and end.

    The head goes back at once: nothing else is needed for it, and its logits, the largest tensor of
    all, never wait.
    """
    last = placement.num_stages
    return tuple(tuple(a for entry in own for a in _with_ends(entry, last)) for own in entries)


def _with_ends(entry: Entry, last: int) -> list[Action]:
    def action(kind: Kind, hop: int) -> Action:
        return Action(kind=kind, microbatch=entry.unit[0], slice=entry.unit[1], hop=hop)

    found = [action(entry.kind, entry.hop)]
    if entry.kind == "forward" and entry.hop == 1:
        found.insert(0, action("embed", 0))
    if entry.kind == "forward" and entry.hop == last:
        found += [action("head", last + 1), action("backward", last + 1)]
    if entry.kind in ("backward", "backward_input") and entry.hop == 1:
        found.append(action("backward", 0))
    return found
