"""Which tokens of a packed sequence a rank holds (pure).

T tokens of the whole sequence, t of this rank. The ring ranks divide the sequence into parts of
documents (`balance`); a ring rank's tokens, ascending, are divided into equal consecutive shares
among its ulysses ranks, which exchange heads for tokens before attention anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import balance
from .errors import ConfigError

_KINDS: dict[str, Callable[[Sequence[int], int], list[list[balance.Part]]]] = {
    "balanced": balance.balanced,
    "zigzag": balance.zigzag,
    "contiguous": balance.contiguous,
}
KINDS = tuple(_KINDS)
"""Names that `SequenceLayout.build` knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive tokens of one document, held by one ring rank."""

    document: int
    """Index of the document in the packed sequence."""
    start: int
    """Offset of the first token inside the document."""
    stop: int
    """Offset behind the last token inside the document."""
    row: int
    """Index of the first token among the ring rank's tokens."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceLayout:
    """One rank's share of a packed sequence, and what it must know of the others' shares."""

    cu_seqlens: torch.Tensor
    """[N+1] int32 on CPU: global document offsets, first 0, last T."""
    ring: int
    """Ranks that pass keys and values around."""
    ulysses: int
    """Ranks that exchange heads for tokens."""
    ring_rank: int
    """This rank on the ring axis."""
    ulysses_rank: int
    """This rank on the ulysses axis."""
    kind: str
    """How documents are divided among ring ranks."""
    segments: tuple[tuple[Segment, ...], ...]
    """Per ring rank its segments, ascending."""
    token_index: torch.Tensor
    """[t] int64 on CPU: global indices of this rank's tokens, ascending."""
    past: tuple[tuple[Segment, ...], ...] = ()
    """For a slice of a sequence, per ring rank what earlier slices hold, whose keys are still there."""
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Communication plans computed from this layout, kept for the next layer's call."""
    kept: Any = None
    """For a slice of a sequence, where keys of all slices are (`attention.kept.Kept`)."""

    @staticmethod
    def build(
        cu_seqlens: Sequence[int] | np.ndarray | torch.Tensor,
        *,
        ring: int,
        ulysses: int,
        ring_rank: int,
        ulysses_rank: int,
        kind: str = "balanced",
    ) -> "SequenceLayout":
        """Divide a packed sequence.

        Args:
            cu_seqlens: N+1 document offsets, first 0, never decreasing, last T; any lengths.
            ring: ranks on the ring axis.
            ulysses: ranks on the ulysses axis.
            ring_rank: this rank on the ring axis.
            ulysses_rank: this rank on the ulysses axis.
            kind: "balanced" (per document, few cuts, even work and tokens), "zigzag" (head-tail
                chunks of the whole sequence) or "contiguous".

        Returns:
            The layout; every rank that builds it with the same offsets agrees on all shares.

        Raises:
            ConfigError: naming the argument and a valid choice.
        """
        offsets = _checked_offsets(cu_seqlens)
        for name, rank, size in (("ring", ring_rank, ring), ("ulysses", ulysses_rank, ulysses)):
            if size < 1:
                raise ConfigError(f"{name}={size} must be at least 1")
            if not 0 <= rank < size:
                raise ConfigError(f"{name}_rank={rank} is outside 0 .. {name} - 1 = {size - 1}")
        if kind not in _KINDS:
            raise ConfigError(f"layout kind={kind!r} is unknown; choose one of {list(KINDS)}")
        parts = _KINDS[kind](np.diff(offsets).tolist(), ring)
        segments = tuple(_segments(own) for own in parts)
        return SequenceLayout(
            cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
            ring=ring,
            ulysses=ulysses,
            ring_rank=ring_rank,
            ulysses_rank=ulysses_rank,
            kind=kind,
            segments=segments,
            token_index=token_index_of(
                offsets, segments[ring_rank], ulysses=ulysses, ulysses_rank=ulysses_rank
            ),
        )

    @property
    def num_tokens(self) -> int:
        """T, tokens of the whole sequence."""
        return int(self.cu_seqlens[-1])

    def at(self, ring_rank: int, ulysses_rank: int) -> "SequenceLayout":
        """The same division as another rank sees it."""
        offsets = self.cu_seqlens.numpy().astype(np.int64)
        index = token_index_of(
            offsets, self.segments[ring_rank], ulysses=self.ulysses, ulysses_rank=ulysses_rank
        )
        return replace(self, ring_rank=ring_rank, ulysses_rank=ulysses_rank, token_index=index, plans={})

    def ring_tokens(self, ring_rank: int) -> int:
        """Tokens of a ring rank, over its ulysses ranks."""
        own = self.segments[ring_rank]
        return own[-1].row + own[-1].length if own else 0

    def past_rows(self, ring_rank: int) -> int:
        """Rows of earlier slices on a ring rank, in front of its own."""
        own = self.past[ring_rank] if self.past else ()
        return own[-1].row + own[-1].length if own else 0

    def shares(self, ring_rank: int) -> list[int]:
        """Tokens of each ulysses rank of a ring rank."""
        return _even(self.ring_tokens(ring_rank), self.ulysses)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _segments(parts: list[balance.Part]) -> tuple[Segment, ...]:
    """Number the rows of ascending parts, joining neighbours that continue each other."""
    joined: list[list[int]] = []
    for document, start, stop in parts:
        if joined and joined[-1][0] == document and joined[-1][2] == start:
            joined[-1][2] = stop
        else:
            joined.append([document, start, stop])
    segments, row = [], 0
    for document, start, stop in joined:
        segments.append(Segment(document=document, start=start, stop=stop, row=row))
        row += stop - start
    return tuple(segments)


def token_index_of(
    offsets: np.ndarray, segments: tuple[Segment, ...], *, ulysses: int, ulysses_rank: int
) -> torch.Tensor:
    """int64 [t]: global indices of a ulysses rank's share of a ring rank's segments."""
    pieces = [np.arange(s.start, s.stop, dtype=np.int64) + offsets[s.document] for s in segments]
    rows = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    shares = _even(len(rows), ulysses)
    first = sum(shares[:ulysses_rank])
    return torch.from_numpy(rows[first : first + shares[ulysses_rank]].copy())


def _checked_offsets(cu_seqlens: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    values = (
        cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, torch.Tensor) else np.asarray(cu_seqlens)
    )
    if values.ndim != 1 or values.size == 0:
        raise ConfigError(f"cu_seqlens has shape {values.shape}; give N+1 document offsets, [0, ..., T]")
    if not np.issubdtype(values.dtype, np.integer):
        raise ConfigError(f"cu_seqlens has dtype {values.dtype}; give whole numbers (int32)")
    offsets = values.astype(np.int64)
    if offsets[0] != 0:
        raise ConfigError(f"cu_seqlens starts at {offsets[0]}; the first document must start at 0")
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ConfigError(f"cu_seqlens ends at {offsets[-1]}; int32 offsets hold at most 2147483647 tokens")
    steps = np.diff(offsets)
    if (steps < 0).any():
        at = int(np.argmax(steps < 0))
        raise ConfigError(
            f"cu_seqlens decreases from {offsets[at]} to {offsets[at + 1]} at index {at + 1}; "
            "document offsets must never decrease"
        )
    return offsets
