"""A lossless codec for floating-point tensors: exponents and mantissas apart, each through zstd.

The bits of an element are rotated left by one, so that the sign leaves the top byte and, in bfloat16
and float32, the top byte is the exponent; then the bytes of one significance stand together (planes).
Exponents of weights and moments take few values; mantissas are noise and are kept as they are where
zstd does not shrink them. A coded tensor is a row of blocks: raw bytes of the block, then the stored
bytes of each plane (uint32, little-endian), then the planes.

Source: ZipNN (Hershcovitch et al. 2024), sec. 3; the rotation is ours.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ConfigError

BLOCK_BYTES = 8 << 20
_LEVEL = 1
Bytes = npt.NDArray[np.uint8]


def check_installed() -> None:
    """Refuse to start with a codec whose library is missing.

    Raises:
        ConfigError: naming the package.
    """
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "checkpoint.codec=zstd needs the package zstandard; install longctx-runtime[zstd], or set "
            "checkpoint.codec=none"
        ) from error


def encode(raw: memoryview, item: int) -> Iterator[bytes]:
    """Coded blocks of a tensor's bytes; `item` is the size of an element."""
    import zstandard

    squeeze = zstandard.ZstdCompressor(level=_LEVEL)
    step = BLOCK_BYTES // item * item
    for first in range(0, len(raw), step):
        block = np.frombuffer(raw[first : first + step], dtype=np.uint8)
        planes = _split(block, item)
        stored = [_shorter(squeeze.compress(plane.data), plane.tobytes()) for plane in planes]
        yield struct.pack(f"<{item + 1}I", len(block), *map(len, stored)) + b"".join(stored)


def decode(stored: bytearray, item: int, num_bytes: int, where: str) -> Bytes:
    """The tensor's bytes again.

    Raises:
        CheckpointError: they do not add up.
    """
    check_installed()
    import zstandard

    expand = zstandard.ZstdDecompressor()
    coded = np.frombuffer(stored, dtype=np.uint8)
    out = np.empty(num_bytes, dtype=np.uint8)
    position = done = 0
    head = 4 * (item + 1)
    try:
        while position < len(coded):
            size, *lengths = struct.unpack(f"<{item + 1}I", coded[position : position + head].tobytes())
            position += head
            planes = []
            for length in lengths:
                planes.append(_expand(expand, coded[position : position + length], size // item))
                position += length
            out[done : done + size] = _join(planes, item)
            done += size
    except (struct.error, ValueError, zstandard.ZstdError) as error:
        raise CheckpointError(f"{where}: the coded bytes cannot be decoded ({error})") from error
    if done != num_bytes:
        raise CheckpointError(f"{where}: decodes to {done} bytes, {num_bytes} were stored")
    return out


def _shorter(squeezed: bytes, plain: bytes) -> bytes:
    return squeezed if len(squeezed) < len(plain) else plain


def _expand(expand: Any, stored: Bytes, size: int) -> Bytes:
    if len(stored) == size:
        return stored
    return np.frombuffer(expand.decompress(stored.tobytes(), max_output_size=size), dtype=np.uint8)


def _split(block: Bytes, item: int) -> list[Bytes]:
    """Planes, least significant first."""
    words = block.view(f"<u{item}")
    turned = (words << 1) | (words >> (8 * item - 1))
    return [np.ascontiguousarray(plane) for plane in turned.view(np.uint8).reshape(-1, item).T]


def _join(planes: list[Bytes], item: int) -> Bytes:
    turned = np.stack(planes, axis=1).reshape(-1).view(f"<u{item}")
    return ((turned >> 1) | (turned << (8 * item - 1))).view(np.uint8)
