"""Documents into pieces of power-of-two lengths: the binary digits of a document's length.

A piece of `length` inputs has `length` targets, shifted by one, inside the same document: a document
of n tokens has n - 1 inputs that have a target, and those are divided, longest piece first. Pieces
do not overlap, every token of a piece is trained, and no attention crosses a document.

Source: Pouransari et al., "Dataset decomposition: faster LLM training with variable sequence length
curriculum", NeurIPS 2024, section 2. The official code also takes a piece's last target away from the
next piece, one token a piece; here it is the next piece's first input.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .index import Int64s
from .packing import Pieces, Tail
from .split import hash_key, hash_numbers

TooLong = Literal["longest", "spread"]
"""What becomes of inputs beyond the longest class: see `decompose`."""
_Bools = npt.NDArray[np.bool_]


class Piece(NamedTuple):
    """Consecutive tokens of a document."""

    start: int
    """First token, counted in the document."""
    length: int
    """Tokens that are inputs, a power of two."""


def decompose(
    num_tokens: int,
    *,
    min_len: int,
    max_len: int,
    tail: Tail = "keep",
    too_long: TooLong = "longest",
    key: int = 0,
) -> list[Piece]:
    """Divide one document.

    Args:
        num_tokens: length of the document, its end-of-document token included.
        min_len: shortest piece in tokens; what is shorter is left out.
        max_len: longest piece in tokens.
        tail: "drop" leaves out what remains of a document after pieces of `max_len`; shorter documents
            keep theirs.
        too_long: inputs beyond `max_len` go to pieces of `max_len` ("longest"), or to every class with
            equal expected tokens ("spread", the official code's default), until the rest is shorter.
        key: of the draws that "spread" makes.

    Returns:
        Pieces from the front of the document; together they leave out fewer than `min_len` of the
        inputs, unless `tail` is "drop".
    """
    columns = decompose_documents(
        np.array([key], dtype=np.int64),
        np.array([num_tokens], dtype=np.int64),
        min_len=min_len,
        max_len=max_len,
        tail=tail,
        too_long=too_long,
    )
    return [Piece(int(s), int(n)) for s, n in zip(columns.start, columns.length, strict=True)]


def decompose_documents(
    documents: Int64s,
    lengths: Int64s,
    *,
    min_len: int,
    max_len: int,
    tail: Tail = "keep",
    too_long: TooLong = "longest",
) -> Pieces:
    """`decompose` for many documents at once: an index over the store, no copy of tokens.

    Args:
        documents: int64 [n], their numbers in the store; also keys of the draws of "spread".
        lengths: int64 [n], their tokens.
        min_len: see `decompose`; rounded up to a power of two.
        max_len: see `decompose`; a power of two.
        tail: see `decompose`.
        too_long: see `decompose`.

    Returns:
        Pieces, document by document, from the front.
    """
    classes = length_classes(min_len, max_len)
    documents = np.asarray(documents, dtype=np.int64)
    inputs = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    parts: list[tuple[Int64s, Int64s, Int64s]] = []  # (row, start, length) of the pieces found so far
    used = np.zeros(len(inputs), dtype=np.int64)
    if too_long == "spread":
        used = _spread(documents, inputs, classes, parts)
    full = (inputs - used) // max_len
    rows = np.repeat(np.arange(len(inputs)), full)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(full) - full, full)
    parts.append((rows, used[rows] + nth * max_len, np.full(len(rows), max_len)))
    used = used + full * max_len
    binary = np.ones(len(inputs), dtype=np.bool_) if tail == "keep" else used == 0
    for length in classes[-2::-1]:
        has = binary & (((inputs - used) & length) != 0)
        rows = np.flatnonzero(has)
        parts.append((rows, used[rows], np.full(len(rows), length)))
        used = used + np.where(has, length, 0)
    row, start, length_ = (np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))
    order = np.lexsort((start, row))
    return Pieces(doc=documents[row[order]], start=start[order], length=length_[order])


def length_classes(min_len: int, max_len: int) -> list[int]:
    """The powers of two from `min_len` (rounded up) to `max_len`.

    Raises:
        ConfigError: `max_len` is no power of two, or below `min_len`.
    """
    low = 1 << max(0, min_len - 1).bit_length()
    if max_len < 1 or max_len & (max_len - 1):
        below = 1 << max(0, max_len.bit_length() - 1)
        raise ConfigError(
            f"data.seq_len={max_len} is no power of two, and a curriculum draws pieces of power-of-two "
            f"lengths; set data.seq_len={below} or {2 * below}, or curriculum.kind=none"
        )
    if low > max_len:
        raise ConfigError(
            f"data.min_len={min_len} is above data.seq_len={max_len} once rounded up to a power of two "
            f"({low}); set data.min_len to at most {max_len}"
        )
    return [1 << k for k in range(low.bit_length() - 1, max_len.bit_length())]


def _spread(
    documents: Int64s, inputs: Int64s, classes: list[int], parts: list[tuple[Int64s, Int64s, Int64s]]
) -> Int64s:
    """Draw pieces of any class while at least two of the longest are left; tokens used per document.

    A class is drawn with odds 1 / length, so every class takes the same expected number of tokens.
    """
    lengths = np.array(classes, dtype=np.int64)
    odds = 1.0 / lengths
    edges = np.cumsum(odds / odds.sum())
    used = np.zeros(len(inputs), dtype=np.int64)
    rows = np.flatnonzero(inputs >= 2 * classes[-1])
    turn = 0
    while len(rows):
        uniform = hash_numbers(documents[rows], hash_key(turn)).astype(np.float64) / 2.0**64
        drawn = lengths[np.minimum(np.searchsorted(edges, uniform, side="right"), len(lengths) - 1)]
        parts.append((rows, used[rows], drawn))
        used[rows] += drawn
        rows = rows[inputs[rows] - used[rows] >= 2 * classes[-1]]
        turn += 1
    return used
