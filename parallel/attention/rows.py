"""Moving ranges of rows between a rank's keys and the messages that carry them."""

import torch

from .tiles import Ranges, count

Tensor = torch.Tensor


def pack(k: Tensor, v: Tensor, rows: Ranges) -> Tensor:
    """The given rows of both, contiguous: [n, K, D] twice -> [2, rows, K, D]."""
    packed = k.new_empty(2, count(rows), *k.shape[1:])
    if rows:
        for target, source in zip(packed, (k, v), strict=True):
            torch.cat([source[start:stop] for start, stop in rows], out=target)
    return packed


def add_rows(whole: Tensor, part: Tensor, rows: Ranges) -> None:
    """Add packed rows to where they belong: whole [n, K, D], part [rows, K, D]."""
    first = 0
    for start, stop in rows:
        whole[start:stop] += part[first : first + stop - start]
        first += stop - start
