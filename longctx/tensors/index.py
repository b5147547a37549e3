"""Which pieces make up which tensor, over all files of a folder; their bytes, checked as they are read."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import xxhash

from ..errors import CheckpointError
from .codec import decode
from .dtypes import ITEM_BYTES, check_dtype
from .folder import Folder, Seen, unseen
from .header import BLOCK_BYTES, Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A whole tensor in files."""

    dtype: str
    """As in files."""
    shape: tuple[int, ...]
    """Of the whole."""
    pieces: tuple[Piece, ...]
    """Disjoint boxes that make it up."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements, as they are in memory."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorIndex:
    """Tensors by name, and where their bytes are."""

    folder: Folder
    """Where the files are."""
    tensors: Mapping[str, Stored]
    """By name."""

    def renamed(self, rename: Callable[[str], str | None]) -> "TensorIndex":
        """Under other names; without those for which `rename` has none."""
        named = {rename(name): stored for name, stored in self.tensors.items()}
        return replace(self, tensors={name: stored for name, stored in named.items() if name is not None})


def index_pieces(
    folder: Folder, pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> TensorIndex:
    """Group pieces by tensor.

    Args:
        folder: where the files are.
        pieces: of all files.
        shapes: of the whole tensors; None: every tensor is one piece.

    Raises:
        CheckpointError: a tensor that the pieces do not cover, or cover twice.
    """
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.name, []).append(piece)
    tensors = {}
    for name, parts in grouped.items():
        shape = parts[0].shape if shapes is None else shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{folder.where}/{parts[0].file} holds {name}, which the manifest does not know"
            )
        found = sum(part.num_elements for part in parts)
        if found != math.prod(shape):
            files = ", ".join(sorted({part.file for part in parts}))
            raise CheckpointError(
                f"{folder.where}: {name} has {found} of {math.prod(shape)} elements in {files}; "
                "a shard is missing or there twice"
            )
        tensors[name] = Stored(dtype=parts[0].dtype, shape=shape, pieces=tuple(parts))
    for name in (shapes or {}).keys() - tensors.keys():
        raise CheckpointError(f"{folder.where}: no file holds {name}")
    return TensorIndex(folder=folder, tensors=tensors)


def index_to_json(index: TensorIndex) -> dict[str, Any]:
    """What other ranks need to read the same files without asking for every header."""
    return {name: asdict(stored) for name, stored in index.tensors.items()}


def index_from_json(folder: Folder, found: Mapping[str, Any]) -> TensorIndex:
    """The other way."""
    tensors = {}
    for name, stored in found.items():
        pieces = tuple(_piece(piece) for piece in stored["pieces"])
        tensors[name] = Stored(dtype=stored["dtype"], shape=tuple(stored["shape"]), pieces=pieces)
    return TensorIndex(folder=folder, tensors=tensors)


def _piece(found: Mapping[str, Any]) -> Piece:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
    }
    return Piece(**values)


def read_piece(folder: Folder, piece: Piece, start: int, out: memoryview) -> None:
    """Fill `out` with a piece's own bytes from `start` on, decoded.

    Only the blocks that are touched are read, each of them whole where there is a checksum.

    Raises:
        CheckpointError: the file is truncated or altered, or the dtype without support; named.
    """
    if piece.dtype not in ITEM_BYTES:
        check_dtype(piece.dtype, f"{folder.where}/{piece.file}: {piece.name}")
    if not piece.coded:
        _read_stored(folder, piece, start, out)
        return
    stored = bytearray(piece.num_bytes)
    _read_stored(folder, piece, 0, memoryview(stored))
    item = ITEM_BYTES[piece.dtype]
    where = f"{folder.where}/{piece.file}: {piece.name}"
    raw = decode(stored, item, piece.num_elements * item, where)
    out[:] = raw.data[start : start + len(out)]


def stream(index: TensorIndex, name: str) -> Iterator[memoryview]:
    """A whole tensor's bytes in order, in blocks of at most `BLOCK_BYTES`, each valid until the next.

    Raises:
        CheckpointError: a file is damaged, or the pieces are no slabs of rows (then read it whole).
    """
    stored = index.tensors[name]
    for piece in sorted(stored.pieces, key=lambda each: each.offset):
        if piece.shape[1:] != stored.shape[1:]:
            raise CheckpointError(f"{name} is not stored by rows; use fill.read_tensor")
        size = piece.num_elements * ITEM_BYTES.get(piece.dtype, 1)
        if piece.coded:
            whole = memoryview(bytearray(size))
            read_piece(index.folder, piece, 0, whole)
            yield whole
            continue
        block = memoryview(bytearray(min(BLOCK_BYTES, size)))
        for start in range(0, size, BLOCK_BYTES):
            part = block[: size - start]
            read_piece(index.folder, piece, start, part)
            yield part


def by_rows(stored: Stored) -> bool:
    """Whether `stream` can read a tensor."""
    return all(piece.shape[1:] == stored.shape[1:] for piece in stored.pieces)


def check_piece(folder: Folder, piece: Piece) -> None:
    """Read all of a piece and compare its checksums, in bounded memory.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    block = memoryview(bytearray(min(BLOCK_BYTES, piece.num_bytes)))
    for start in range(0, piece.num_bytes, BLOCK_BYTES):
        _read_stored(folder, piece, start, block[: piece.num_bytes - start])


def _read_stored(folder: Folder, piece: Piece, start: int, out: memoryview) -> None:
    stop = start + len(out)
    if piece.sums is None:
        _read_exactly(folder, piece, start, out)
        return
    for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
        low, high = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, piece.num_bytes)
        inside = low >= start and high <= stop
        block = out[low - start : high - start] if inside else memoryview(bytearray(high - low))
        digest = xxhash.xxh3_64()
        _read_exactly(folder, piece, low, block, seen=digest.update)
        if number >= len(piece.sums) or digest.hexdigest() != piece.sums[number]:
            raise CheckpointError(
                f"{folder.where}/{piece.file} is altered: a checksum of {piece.name} is not the manifest's"
            )
        if not inside:
            first, last = max(low, start), min(high, stop)
            out[first - start : last - start] = block[first - low : last - low]


def _read_exactly(folder: Folder, piece: Piece, start: int, out: memoryview, *, seen: Seen = unseen) -> None:
    try:
        count = folder.read_into(piece.file, piece.start + start, out, seen=seen)
    except OSError as error:
        raise CheckpointError(f"{folder.where}/{piece.file} cannot be read: {error}") from error
    if count != len(out):
        raise CheckpointError(f"{folder.where}/{piece.file} is truncated: it ends inside {piece.name}")
