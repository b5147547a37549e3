"""One microbatch as tensors: packed pieces, no batch dimension, no padding.

Targets are shifted here, before anything is split over ranks, so no rank needs its neighbour's
token. T: tokens of the microbatch, N: pieces, t: tokens of one rank.
"""

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import DataError
from .packing import Pack, Piece
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalBatch:
    """One rank's tokens of a microbatch, in its layout's order."""

    input_ids: Tensor
    """int64 [t]."""
    targets: Tensor
    """int64 [t]: the token that follows each one in its document; 0 at the document's end."""
    position_ids: Tensor
    """int64 [t]: position in the piece."""
    rope_id: Tensor
    """int64 [t]: which set of rotary frequencies a token uses."""
    loss_mask: Tensor
    """bool [t]: whether the target is trained."""

    @property
    def num_tokens(self) -> int:
        """Tokens t."""
        return int(self.input_ids.numel())

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(LocalBatch)}
        return type(self)(**moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One microbatch, the same on every rank of its sequence group. Lives on the CPU."""

    input_ids: Tensor
    """int64 [T]."""
    targets: Tensor
    """int64 [T]: see `LocalBatch`."""
    position_ids: Tensor
    """int64 [T]: restart at 0 in every piece."""
    rope_id: Tensor
    """int64 [T]: zeros until pieces ask for other frequencies."""
    loss_mask: Tensor
    """bool [T]: False at a document's last token and, with loss spans, wherever they say."""
    cu_seqlens: Tensor
    """int32 [N+1]: first token of each piece, then T."""
    doc_ids: tuple[int, ...]
    """N: store document of each piece."""
    starts: tuple[int, ...] = ()
    """N: first token of each piece in its document; empty: all at the beginning."""
    degree: int | None = None
    """Ranks of the sequence group that shares it, where a step plan says; None: the configured layout's."""

    @property
    def num_tokens(self) -> int:
        """Tokens T."""
        return int(self.input_ids.numel())

    def token_id(self) -> Tensor:
        """int64 [T]: document and position in it, the same wherever the token is packed."""
        pieces = zip(self.doc_ids, self.starts or (0,) * len(self.doc_ids), strict=True)
        first = torch.tensor([(doc << 32) + start for doc, start in pieces], dtype=torch.int64)
        return self.position_ids + first.repeat_interleave(self.cu_seqlens.diff())

    def take(self, token_index: Tensor) -> LocalBatch:
        """The tokens with these global indices.

        Args:
            token_index: int64 [t], `SequenceLayout.token_index`.
        """
        return LocalBatch(**{f.name: getattr(self, f.name)[token_index] for f in fields(LocalBatch)})

    @classmethod
    def empty(cls) -> Self:
        """A microbatch without tokens, for a data group that has nothing left to compute."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            input_ids=none,
            targets=none,
            position_ids=none,
            rope_id=none,
            loss_mask=torch.zeros(0, dtype=torch.bool),
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            doc_ids=(),
        )


def build_batch(store: Tokens, pack: Pack, *, vocab_size: int | None = None) -> PackedBatch:
    """Read a pack's tokens.

    Args:
        store: that the pack's document numbers refer to.
        pack: pieces; none make an empty batch.
        vocab_size: rows of the model's embedding; None: not checked.

    Raises:
        DataError: a token id has no row, with the document's name.
    """
    if not pack:
        return PackedBatch.empty()
    offsets = list(accumulate((piece.length for piece in pack), initial=0))
    input_ids = np.empty(offsets[-1], dtype=np.int64)
    targets = np.zeros(offsets[-1], dtype=np.int64)
    loss_mask = np.zeros(offsets[-1], dtype=np.bool_)
    for piece, offset in zip(pack, offsets, strict=False):
        tokens = _read(store, piece, vocab_size)
        known = len(tokens) - 1  # targets: the piece's last token has one unless it ends its document
        input_ids[offset : offset + piece.length] = tokens[: piece.length]
        targets[offset : offset + known] = tokens[1:]
        loss_mask[offset : offset + known] = True
        if store.spans is not None:
            first = piece.start + 1
            loss_mask[offset : offset + known] = store.spans.mask(piece.doc, first, first + known)
    lengths = np.diff(offsets)
    positions = np.arange(offsets[-1], dtype=np.int64) - np.repeat(np.asarray(offsets[:-1]), lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions),
        rope_id=torch.zeros(offsets[-1], dtype=torch.int64),
        loss_mask=torch.from_numpy(loss_mask),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        doc_ids=tuple(piece.doc for piece in pack),
        starts=tuple(piece.start for piece in pack),
    )


def _read(store: Tokens, piece: Piece, vocab_size: int | None) -> npt.NDArray[Any]:
    """Tokens of a piece and, where its document goes on, the next one."""
    stop = min(piece.start + piece.length + 1, int(store.lengths[piece.doc]))
    tokens = store.document(piece.doc, piece.start, stop)
    if vocab_size is not None and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        wrong = int(tokens[(tokens >= vocab_size) | (tokens < 0)][0])
        raise DataError(store.outside_vocab(piece.doc, wrong, vocab_size))
    return tokens
