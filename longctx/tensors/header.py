"""Headers of safetensors files, read without touching the tensors, and written ahead of them. No torch.

A file is 8 bytes (length n of the header, little-endian), n bytes of JSON padded with spaces, data.
A file of ours may hold a part of a tensor: where it begins in the whole stands in the metadata, under
the key that torch.distributed.checkpoint reads too.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .dtypes import ITEM_BYTES
from .folder import Folder

OFFSETS = "DCP_SHARDING_INFO"
CODED = "LONGCTX_CODED"
MAX_HEADER_BYTES = 100 << 20
"""As in the safetensors library."""
BLOCK_BYTES = 4 << 20
"""Stored bytes under one checksum: what is read at least, and what stays in the cache for its hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A box of a tensor, stored in one file."""

    name: str
    """The tensor."""
    file: str
    """Name in its folder."""
    start: int
    """First byte in the file."""
    num_bytes: int
    """Bytes in the file."""
    dtype: str
    """As in `dtypes.ITEM_BYTES` (or any other that a foreign file has)."""
    offset: tuple[int, ...]
    """Index of its first element in the tensor."""
    shape: tuple[int, ...]
    """Its own shape."""
    coded: bool = False
    """Whether the bytes went through `codec`."""
    sums: tuple[str, ...] | None = None
    """xxh3-64 of every `BLOCK_BYTES` of the stored bytes, where they are known."""

    @property
    def num_elements(self) -> int:
        """Elements of the box."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says about itself."""

    pieces: tuple[Piece, ...]
    """In file order."""
    num_bytes: int
    """Bytes before the data, the length field included."""
    file_bytes: int
    """Bytes that the whole file must have."""
    raw: bytes
    """The length field and the JSON, for a checksum."""


def read_header(folder: Folder, name: str) -> Header:
    """The header of a file, checked against the file's size.

    Raises:
        CheckpointError: the file is missing, no safetensors file, or truncated.
    """
    where = f"{folder.where}/{name}"
    size = folder.size(name)
    if size is None:
        raise CheckpointError(f"{where} is missing")
    try:
        length = folder.read(name, 0, 8)
        count = struct.unpack("<Q", length)[0] if len(length) == 8 else MAX_HEADER_BYTES + 1
        if count > min(MAX_HEADER_BYTES, size):
            raise CheckpointError(f"{where} is no safetensors file, or is truncated ({size} bytes)")
        raw = bytes(length + folder.read(name, 8, count))
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    try:
        header = _parse(raw, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} has a broken header ({error!r}); copy the file again") from error
    if header.file_bytes != size:
        raise CheckpointError(f"{where} has {size} bytes, its header speaks of {header.file_bytes}")
    return header


def _parse(raw: bytes, name: str) -> Header:
    found = json.loads(raw[8:])
    metadata = found.pop("__metadata__", {})
    offsets = json.loads(metadata.get(OFFSETS, "{}"))
    coded = json.loads(metadata.get(CODED, "{}"))
    pieces = []
    for tensor, entry in found.items():
        first, last = entry["data_offsets"]
        logical = coded.get(tensor, entry)
        shape = tuple(logical["shape"])
        saved = offsets.get(tensor, {}).get("saved_offsets", [0] * len(shape))
        piece = Piece(
            name=tensor,
            file=name,
            start=len(raw) + first,
            num_bytes=last - first,
            dtype=logical["dtype"],
            offset=tuple(saved),
            shape=shape,
            coded=tensor in coded,
        )
        pieces.append(piece)
    pieces.sort(key=lambda piece: (piece.start, piece.num_bytes))
    end = len(raw)
    for piece in pieces:  # as the safetensors library demands: no holes, no overlaps
        plain = piece.num_elements * ITEM_BYTES.get(piece.dtype, 0)
        if piece.start != end or (plain != piece.num_bytes and plain and not piece.coded):
            raise ValueError(
                f"{piece.name}: {piece.num_bytes} bytes at {piece.start} for {piece.dtype} {piece.shape}"
            )
        end += piece.num_bytes
    return Header(pieces=tuple(pieces), num_bytes=len(raw), file_bytes=end, raw=raw)


def encode_header(pieces: Iterable[Piece], *, room: int = 0, extra: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the data; `start` of the pieces is ignored, they follow each other.

    Args:
        pieces: in file order, with their stored sizes.
        room: least number of bytes, so that a later header with other sizes fits.
        extra: more metadata.
    """
    entries: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    coded: dict[str, Any] = {}
    position = 0
    for piece in pieces:
        entry = {"dtype": piece.dtype, "shape": list(piece.shape)}
        if piece.coded:
            coded[piece.name] = entry
            entry = {"dtype": "U8", "shape": [piece.num_bytes]}
        entries[piece.name] = entry | {"data_offsets": [position, position + piece.num_bytes]}
        if any(piece.offset):
            offsets[piece.name] = {"saved_offsets": list(piece.offset)}
        position += piece.num_bytes
    metadata = {"format": "pt", **(extra or {})}
    if offsets:
        everywhere = {name: {"saved_offsets": [0] * len(entries[name]["shape"])} for name in entries}
        metadata |= {"DCP_VERSION": "1.0", OFFSETS: json.dumps(everywhere | offsets)}
    if coded:
        metadata[CODED] = json.dumps(coded)
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    length = max(-(-(8 + len(text)) // 8) * 8, room)
    return struct.pack("<Q", length - 8) + text.ljust(length - 8, b" ")
