"""Loss by position: where in a long document the model predicts well. Pure but for reading tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.index import Int64s
from ..data.split import hash_numbers
from ..data.tokens import Tokens
from ..errors import DataError
from .score import IGNORED, Row, Sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Held-out token rows of one length."""

    rows: tuple[Tensor, ...]
    """int64 [length + 1] each."""
    joined: int
    """Rows that are several documents in a row, for want of documents so long."""


def take_texts(store: Tokens, documents: Int64s, *, length: int, count: int) -> Texts:
    """The beginnings of long documents; where they are too few, short ones joined.

    Args:
        store: tokens.
        documents: numbers of the held-out documents.
        length: tokens of a row, T.
        count: rows wanted.

    Raises:
        DataError: all held-out documents together are shorter.
    """
    order = documents[np.argsort(hash_numbers(documents), kind="stable")]  # the same in every run
    long = [int(d) for d in order if store.lengths[d] > length][:count]
    rows = [_tensor(store.document(d, 0, length + 1)) for d in long]
    rest = _joined(store, [int(d) for d in order if int(d) not in long], length, count - len(rows))
    if not rows and not rest:
        total = int(store.lengths[documents].sum())
        raise DataError(
            f"the held-out documents have {total} tokens together, too few for eval.lengths={length}; raise "
            "data.held_out, add documents, or choose shorter eval.lengths"
        )
    return Texts(rows=(*rows, *rest), joined=len(rest))


def _joined(store: Tokens, documents: list[int], length: int, count: int) -> list[Tensor]:
    rows: list[Tensor] = []
    parts: list[Tensor] = []
    held = 0
    for document in documents:
        if len(rows) == count:
            break
        taken = min(int(store.lengths[document]), length + 1 - held)
        part = _tensor(store.document(document, 0, taken))
        parts, held = [*parts, part], held + len(part)
        if held == length + 1:
            rows.append(torch.cat(parts))
            parts, held = [], 0
    return rows


def _tensor(tokens: Any) -> Tensor:
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))


def windows(length: int, *, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, stop, first scored) that score every position once, as late as possible.

    Args:
        length: positions.
        window: positions that are seen at once; 0: all.
        stride: positions by which the window slides; only they are scored after the first window.
    """
    if not window or window >= length:
        return [(0, length, 0)]
    found = [(0, window, 0)]
    while found[-1][1] < length:
        scored = found[-1][1]
        stop = min(scored + stride, length)
        found.append((stop - window, stop, scored))
    return found


def bucket_edges(length: int, buckets: int) -> list[int]:
    """Edges of at most `buckets` equal ranges of positions, from 0 to `length`."""
    buckets = min(buckets, length)
    return [length * i // buckets for i in range(buckets + 1)]


def position_rows(text: Tensor, edges: list[int], *, window: int, stride: int) -> list[Row]:
    """The rows that score one text; labels are its buckets of positions."""
    length = edges[-1]
    labels = torch.bucketize(torch.arange(length), torch.tensor(edges[1:-1], dtype=torch.int64), right=True)
    rows = []
    for start, stop, scored in windows(length, window=window, stride=stride):
        own = labels[start:stop].clone()
        own[: scored - start] = IGNORED
        rows.append(Row(ids=text[start : stop + 1], labels=own))
    return rows


def by_bucket(found: Sequence[Sums], edges: list[int]) -> list[dict[str, float]]:
    """Mean loss in nats of each bucket of positions that has tokens."""
    loss = sum((each.loss for each in found), torch.zeros(len(edges) - 1)).tolist()
    tokens = sum((each.tokens for each in found), torch.zeros(len(edges) - 1)).tolist()
    return [
        {"from": first, "to": last, "loss": loss[i] / tokens[i], "tokens": int(tokens[i])}
        for i, (first, last) in enumerate(pairwise(edges))
        if tokens[i]
    ]
