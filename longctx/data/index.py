r"""The index of a token file, Megatron-core's `.idx`: where every sequence and document lies.

Layout, little endian: `MMIDIDX\0\0`, uint64 version 1, uint8 dtype code, uint64 number of sequences
S, uint64 number of document boundaries N+1, int32 lengths [S], int64 byte offsets [S], int64 document
boundaries [N+1] counted in sequences, and for multimodal files int8 modes [S].
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Int64s = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
DTYPES: dict[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_CODES = {name: code for code, name in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron-core picks for a vocabulary: uint16 below 65,500 ids, int32 above."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Where the documents of a token file lie. A document may span several sequences."""

    dtype: np.dtype[Any]
    """Type of a token on disk."""
    starts: Int64s
    """int64 [N]: first token of each document, counted in tokens from the file's start."""
    lengths: Int64s
    """int64 [N]: tokens of each document."""

    @property
    def bin_bytes(self) -> int:
        """Size that the token file must have."""
        return int(self.lengths.sum()) * self.dtype.itemsize


def write_index(file: BinaryIO, lengths: Int64s, dtype: np.dtype[Any]) -> None:
    """Write the index of a token file that holds one sequence per document.

    Args:
        file: opened for writing.
        lengths: int64 [N], tokens of each document.
        dtype: type of a token in the token file.
    """
    if len(lengths) and int(lengths.max()) >= 2**31:
        raise DataError(
            f"document {int(lengths.argmax())} has {int(lengths.max()):,} tokens, the format holds at most "
            f"{2**31 - 1:,}; split that document"
        )
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    file.write(_HEAD.pack(MAGIC, 1, _CODES[dtype.name], len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write(pointers.astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_index(path: Path) -> Index:
    """Read an index and check that it is whole and consistent.

    Raises:
        DataError: not such an index, truncated, or pointing at anything but one contiguous token file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:9] != MAGIC:
        raise DataError(f"{path} is not a Megatron-core index (it does not start with MMIDIDX); {_AGAIN}")
    _, version, code, sequences, boundaries = _HEAD.unpack(head)
    if version != 1 or code not in DTYPES or DTYPES[code].startswith("float"):
        raise DataError(f"{path}: version {version} with dtype code {code} is not readable here; {_AGAIN}")
    wanted = _HEAD.size + 12 * sequences + 8 * boundaries
    if size not in (wanted, wanted + sequences):
        raise DataError(
            f"{path} has {size:,} bytes, its {sequences:,} sequences need {wanted:,}: truncated; {_AGAIN}"
        )
    return _documents(path, np.dtype(DTYPES[code]), sequences, boundaries)


_AGAIN = "prepare it again, or point data.path at an intact store"


def _documents(path: Path, dtype: np.dtype[Any], sequences: int, boundaries: int) -> Index:
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEAD.size)
    lengths = raw[: 4 * sequences].view("<i4").astype(np.int64)
    pointers = raw[4 * sequences : 12 * sequences].view("<i8")
    edges = raw[12 * sequences : 12 * sequences + 8 * boundaries].view("<i8").astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if boundaries == 0 or edges[0] != 0 or edges[-1] != sequences or (np.diff(edges) < 0).any():
        raise DataError(f"{path}: its document boundaries do not run from 0 to {sequences:,}; {_AGAIN}")
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise DataError(f"{path}: its sequences do not follow each other in the token file; {_AGAIN}")
    return Index(dtype=dtype, starts=starts[edges[:-1]], lengths=np.diff(starts[edges]))
