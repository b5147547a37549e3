"""Write one safetensors file piece by piece, hashing on the way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from .codec import encode
from .dtypes import ITEM_BYTES
from .folder import STEP_BYTES, Folder
from .header import BLOCK_BYTES, Piece, encode_header

Chunk = memoryview | bytes | bytearray


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What is on disk now, for the manifest."""

    file: str
    """Name of the file."""
    num_bytes: int
    """Its size."""
    header_xxh3: str
    """Checksum of everything before the data."""
    sums: dict[str, list[str]]
    """Tensor -> checksums of its stored bytes, one for each `BLOCK_BYTES`."""

    def record(self) -> dict[str, Any]:
        """As JSON, without the name."""
        return {"bytes": self.num_bytes, "header_xxh3": self.header_xxh3, "sums": self.sums}


@dataclass(kw_only=True, slots=True)
class Item:
    """A piece and where its bytes come from."""

    piece: Piece
    """Name, dtype, offset and shape; file, sizes and positions are filled in."""
    chunks: Iterable[Chunk]
    """Its bytes, decoded; asked for once."""


def write_file(folder: Folder, name: str, items: Sequence[Item], *, coded: bool = False) -> Written:
    """Write all items in order; the file appears when it is complete.

    Args:
        folder: must exist.
        name: of the file.
        items: in file order.
        coded: through `codec`; sizes are known only afterwards, so the header is written twice.
    """
    pieces = [replace(item.piece, num_bytes=_raw_bytes(item.piece), coded=coded) for item in items]
    # Room for a header with larger numbers: a coded tensor may be somewhat larger than the plain one.
    room = len(encode_header([replace(p, num_bytes=10 * p.num_bytes + 100) for p in pieces])) if coded else 0
    header = encode_header(pieces, room=room)
    sums: dict[str, list[str]] = {}
    with folder.create(name) as file:
        file.write(header)
        for position, item in enumerate(items):
            count, sums[item.piece.name] = _write_item(file, item, coded=coded)
            if not coded and count != pieces[position].num_bytes:
                raise ValueError(f"{item.piece.name}: {count} bytes for shape {item.piece.shape}")
            pieces[position] = replace(pieces[position], num_bytes=count)
        if coded:
            header = encode_header(pieces, room=room)
            file.seek(0)
            file.write(header)
    size = len(header) + sum(piece.num_bytes for piece in pieces)
    return Written(file=name, num_bytes=size, header_xxh3=xxhash.xxh3_64_hexdigest(header), sums=sums)


def _write_item(file: Any, item: Item, *, coded: bool) -> tuple[int, list[str]]:
    count, sums = 0, []
    blocks = _blocks(_coded(item)) if coded else _blocks(item.chunks, size=_raw_bytes(item.piece))
    for block in blocks:
        digest = xxhash.xxh3_64()
        view = memoryview(block)
        for start in range(0, len(view), STEP_BYTES):
            part = view[start : start + STEP_BYTES]
            digest.update(part)
            file.write(part)
        sums.append(digest.hexdigest())
        count += len(view)
    return count, sums


def _blocks(chunks: Iterable[Chunk], *, size: int = -1) -> Iterator[Chunk]:
    """The same bytes in blocks of `BLOCK_BYTES`, the last one shorter; without a copy where borders agree.

    With the `size` of all chunks together, the last one's end is not copied either.
    """
    rest = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        size -= len(view)
        if rest:
            need = BLOCK_BYTES - len(rest)
            rest += view[:need]
            view = view[need:]
            if len(rest) < BLOCK_BYTES:
                continue
            yield rest
            rest = bytearray()
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            yield view[start : start + BLOCK_BYTES]
        if size == 0 and len(view) > whole:
            yield view[whole:]
        elif len(view) > whole:
            rest = bytearray(view[whole:])
    if rest:
        yield rest


def _raw_bytes(piece: Piece) -> int:
    return piece.num_elements * ITEM_BYTES[piece.dtype]


def _coded(item: Item) -> Iterator[bytes]:
    whole = b"".join(item.chunks)
    return encode(memoryview(whole), ITEM_BYTES[item.piece.dtype])
