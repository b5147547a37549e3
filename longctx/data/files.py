"""Files that are written whole or not at all, and the checksums they carry."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from ..errors import DataError
from ..files import atomic_file

BLOCK_BYTES = 64 << 20
"""Size of the blocks of a token file that are checksummed one by one."""
_READ_BYTES = 4 << 20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def data_file(path: Path) -> Iterator[BinaryIO]:
    """`atomic_file` with a full disk as a `DataError`; what stood under `path` before is untouched."""
    with named_disk_full(path), atomic_file(path) as file:
        yield file


@contextmanager
def named_disk_full(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space" into an error that says where and what to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise DataError(
            f"the disk is full while writing {path} ({error.strerror}, {free:,.0f} MiB free); what was "
            f"complete is kept: free space, or point data.cache_dir at another disk, and run it again"
        ) from error


class BlockHasher:
    """xxh3-64 of every `BLOCK_BYTES` of a stream, so that damage is found by place, not only by fact."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self._hasher = xxhash.xxh3_64()
        self._left = BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Append bytes to the stream."""
        while len(data):
            part = data[: self._left]
            self._hasher.update(part)
            self._left -= len(part)
            data = data[len(part) :]
            if self._left == 0:
                self._close_block()

    def finish(self) -> list[str]:
        """The digests in hexadecimal, the last one of a possibly shorter block."""
        if self._left < BLOCK_BYTES:
            self._close_block()
        return self.digests

    def _close_block(self) -> None:
        self.digests.append(self._hasher.hexdigest())
        self._hasher = xxhash.xxh3_64()
        self._left = BLOCK_BYTES


def hash_blocks(path: Path) -> list[str]:
    """Block digests of a file on disk."""
    hasher = BlockHasher()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(memoryview(data))
    return hasher.finish()


def hash_block(path: Path, block: int) -> str:
    """Digest of one block of a file on disk."""
    hasher = xxhash.xxh3_64()
    left = BLOCK_BYTES
    with path.open("rb") as file:
        file.seek(block * BLOCK_BYTES)
        while left and (data := file.read(min(left, _READ_BYTES))):
            hasher.update(data)
            left -= len(data)
    return hasher.hexdigest()
