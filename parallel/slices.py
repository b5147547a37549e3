"""Cutting a packed sequence into slices that follow each other through a pipeline (pure).

A slice is a range of tokens, divided over ring and ulysses ranks like a sequence of its own. Its
queries also see the keys that earlier slices have left on each ring rank, behind which its own keys
are counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from .layout import Segment, SequenceLayout, token_index_of


def slice_bounds(cu_seqlens: torch.Tensor | Sequence[int], count: int, *, token_cost: float) -> list[int]:
    """Token offsets of slices of equal work.

    Args:
        cu_seqlens: [N+1] document offsets.
        count: number of slices.
        token_cost: work of a token beside attention, over that of one query-key pair.

    Returns:
        count + 1 offsets, from 0 to T; a slice may be empty.
    """
    offsets = np.asarray(cu_seqlens, dtype=np.int64)
    total = int(offsets[-1])
    position = np.arange(total) - np.repeat(offsets[:-1], np.diff(offsets))
    work = np.cumsum(position + 1.0 + token_cost)
    wanted = np.arange(1, count) / count * (work[-1] if total else 0.0)
    inner = [int(bound) for bound in np.searchsorted(work, wanted, side="right")]
    return [0, *inner, total]


def slice_layouts(whole: SequenceLayout, bounds: Sequence[int]) -> tuple[SequenceLayout, ...]:
    """One rank's share of every slice.

    Args:
        whole: the layout of the sequence, which says how it is divided and who this rank is.
        bounds: token offsets of the slices.

    Returns:
        Layouts with the whole sequence's offsets and positions; `past` says what earlier slices left.
    """
    offsets = whole.cu_seqlens.numpy().astype(np.int64)
    past: list[list[Segment]] = [[] for _ in range(whole.ring)]
    found = []
    for first, stop in pairwise(bounds):
        # Documents outside the slice are empty in it, so that their numbers stay the whole's.
        cut = SequenceLayout.build(
            np.clip(offsets, first, stop) - first,
            ring=whole.ring,
            ulysses=whole.ulysses,
            ring_rank=whole.ring_rank,
            ulysses_rank=whole.ulysses_rank,
            kind=whole.kind,
        )
        segments = tuple(tuple(_moved(s, offsets, first) for s in own) for own in cut.segments)
        index = token_index_of(
            offsets, segments[whole.ring_rank], ulysses=whole.ulysses, ulysses_rank=whole.ulysses_rank
        )
        layout = replace(
            cut,
            cu_seqlens=whole.cu_seqlens,
            segments=segments,
            token_index=index,
            past=tuple(tuple(own) for own in past),
            plans={},
        )
        found.append(layout)
        for ring_rank, own in enumerate(past):
            rows = layout.past_rows(ring_rank)
            own += [replace(segment, row=segment.row + rows) for segment in segments[ring_rank]]
    return tuple(found)


def _moved(segment: Segment, offsets: np.ndarray, first: int) -> Segment:
    """A segment of a slice that starts at token `first`, by its positions in the whole document."""
    before = max(0, first - int(offsets[segment.document]))
    return replace(segment, start=segment.start + before, stop=segment.stop + before)
