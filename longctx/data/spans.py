r"""PREFIX.spans: which tokens of a store count in the loss, as ranges per document.

Layout, little endian: `LCSPANS\0`, uint64 version 1, uint64 xxh3-64 of PREFIX.idx (so that spans of
another store are refused), uint64 number of documents N, uint64 number of spans S, int64 first span
of each document [N+1], int64 (start, stop) [S, 2] in tokens of the document, and last the uint64
xxh3-64 of all bytes before. The spans of a document ascend and do not overlap. A token is trained,
as a target, where a span covers it; a document without spans is read but never trained.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import DataError
from .files import data_file
from .index import Int64s

_MAGIC = b"LCSPANS\x00"
_HEAD = struct.Struct("<8sQQQQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Trained ranges of every document."""

    first: Int64s
    """int64 [N+1]: number of a document's first span."""
    bounds: Int64s
    """int64 [S, 2]: start and stop of each span, in tokens of its document."""

    def mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the document's tokens [start, stop) are trained: bool [stop - start]."""
        bounds = self.bounds[self.first[document] : self.first[document + 1]]
        edges = np.clip(bounds - start, 0, stop - start)
        steps = np.zeros(stop - start + 1, dtype=np.int32)
        np.add.at(steps, edges[:, 0], 1)
        np.add.at(steps, edges[:, 1], -1)
        return np.cumsum(steps[:-1]) > 0


def write_spans(prefix: str, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Write the side file of a store.

    Args:
        prefix: of a complete store.
        spans: for each document its trained ranges (start, stop), in tokens.
    """
    first = np.cumsum([0, *(len(of_document) for of_document in spans)]).astype("<i8")
    bounds = np.array([bound for of_document in spans for bound in of_document], dtype="<i8")
    index = xxhash.xxh3_64_intdigest(Path(prefix + ".idx").read_bytes())
    head = _HEAD.pack(_MAGIC, 1, index, len(spans), len(bounds))
    body = head + first.tobytes() + bounds.tobytes()
    with data_file(Path(prefix + ".spans")) as file:
        file.write(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)))


def read_spans(path: Path, index_path: Path, lengths: Int64s) -> Spans:
    """Read and check a side file.

    Args:
        path: PREFIX.spans.
        index_path: PREFIX.idx, to which the side file is bound.
        lengths: int64 [N], tokens of each document.

    Raises:
        DataError: damaged, of another store, or with ranges outside their document.
    """
    data = path.read_bytes()
    if len(data) < _HEAD.size + 8 or data[:8] != _MAGIC:
        raise DataError(f"{path} is not a file of loss spans, or truncated; {_AGAIN}")
    if xxhash.xxh3_64_intdigest(data[:-8]) != struct.unpack("<Q", data[-8:])[0]:
        raise DataError(f"{path} is damaged: its checksum does not match its content; {_AGAIN}")
    _, version, index, documents, count = _HEAD.unpack_from(data)
    if (
        version != 1
        or documents != len(lengths)
        or index != xxhash.xxh3_64_intdigest(index_path.read_bytes())
    ):
        raise DataError(
            f"{path} (version {version}, {documents:,} documents) belongs to another store; {_AGAIN}"
        )
    first = np.frombuffer(data, dtype="<i8", count=documents + 1, offset=_HEAD.size)
    bounds = np.frombuffer(data, dtype="<i8", count=2 * count, offset=_HEAD.size + first.nbytes)
    spans = Spans(first=first, bounds=bounds.reshape(-1, 2))
    _check_bounds(path, spans, lengths)
    return spans


_AGAIN = "write the spans again, or delete the file to train on every token"


def _check_bounds(path: Path, spans: Spans, lengths: Int64s) -> None:
    owner = np.repeat(np.arange(len(lengths)), np.diff(spans.first))
    start, stop = spans.bounds[:, 0], spans.bounds[:, 1]
    wrong = (start < 0) | (start > stop) | (stop > lengths[owner])
    wrong[1:] |= (owner[1:] == owner[:-1]) & (start[1:] < stop[:-1])
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{path}: span {start[place]}..{stop[place]} of document {owner[place]} overlaps another or "
            f"leaves its {lengths[owner[place]]} tokens; {_AGAIN}"
        )
