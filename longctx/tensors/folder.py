"""A folder of files, on a local disk or behind any fsspec URL, in the few verbs that checkpoints need."""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import CheckpointError, ConfigError
from ..files import atomic_file, sync_folder

Where = Path | str
"""A local path, or a URL such as `s3://bucket/run/ckpt`."""
Seen = Callable[[memoryview], Any]
STEP_BYTES = 256 << 10
"""What is read, or hashed, before it is hashed, or written: it is still in the core's own cache then."""


def unseen(part: memoryview) -> None:
    """Nobody looks at what is read."""


class Folder(Protocol):
    """Files by name; names may hold `/`."""

    where: Where
    """For messages, and to open it again."""
    renames: bool
    """Whether a folder can take its final name in one step."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""

    def read(self, name: str, start: int, count: int) -> bytearray:
        """Some bytes of a file, fewer at its end."""

    def read_into(self, name: str, start: int, buffer: memoryview, *, seen: Seen = unseen) -> int:
        """Fill `buffer` from a file; returns how many bytes there were, each of which `seen` was shown."""

    def create(self, name: str) -> Any:
        """Context manager: a writable file that is on disk when it is left without error."""

    def names(self) -> list[str]:
        """Names directly inside, files and folders, sorted."""

    def folder(self, name: str) -> "Folder":
        """A folder inside, which need not exist."""

    def make(self) -> None:
        """Create it, empty: what was there is removed."""

    def remove(self, name: str = "") -> None:
        """Remove a file or folder inside, or the folder itself; nothing happens if it is not there."""

    def publish(self, name: str, final: str) -> None:
        """Give a finished folder inside its final name, unless something is there (only where `renames`)."""

    def free_bytes(self) -> int | None:
        """Free space; None: unknown."""


def folder_at(where: Where) -> Folder:
    """The folder at a path or URL.

    Raises:
        ConfigError: no fsspec, or it does not know the protocol.
    """
    text = str(where)
    return _remote(text) if is_url(text) else LocalFolder(Path(text))


def is_url(where: Where) -> bool:
    """Whether fsspec is needed to reach it."""
    return "://" in str(where)


class LocalFolder:
    """A folder on a file system that this process sees."""

    renames = True

    def __init__(self, path: Path) -> None:
        self.where: Where = path
        self._path = path
        self._prefix = f"{path}/"  # joining paths takes longer than opening a file

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""
        try:  # one look: `ckpt prune` may remove a file while a run lists its checkpoints
            found = os.stat(self._prefix + name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str, start: int, count: int) -> bytearray:
        """Some bytes of a file, fewer at its end."""
        buffer = bytearray(count)
        return buffer[: self.read_into(name, start, memoryview(buffer))]

    def read_into(self, name: str, start: int, buffer: memoryview, *, seen: Seen = unseen) -> int:
        """Fill `buffer` from a file; returns how many bytes there were, each of which `seen` was shown."""
        descriptor = os.open(self._prefix + name, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done : done + STEP_BYTES]], start + done)
                if not count:
                    break
                seen(buffer[done : done + count])
                done += count
            return done
        finally:
            os.close(descriptor)

    def create(self, name: str) -> Any:
        """Context manager: a writable file that is on disk when it is left without error."""
        (self._path / name).parent.mkdir(parents=True, exist_ok=True)
        return atomic_file(self._path / name)

    def names(self) -> list[str]:
        """Names directly inside, files and folders, sorted."""
        return sorted(path.name for path in self._path.iterdir()) if self._path.is_dir() else []

    def folder(self, name: str) -> "LocalFolder":
        """A folder inside, which need not exist."""
        return LocalFolder(self._path / name)

    def make(self) -> None:
        """Create it, empty: what was there is removed."""
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)

    def remove(self, name: str = "") -> None:
        """Remove a file or folder inside, or the folder itself; nothing happens if it is not there."""
        path = self._path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def publish(self, name: str, final: str) -> None:
        """Give a finished folder inside its final name, unless something is there."""
        sync_folder(self._path / name)
        os.replace(self._path / name, self._path / final)
        sync_folder(self._path)

    def free_bytes(self) -> int:
        """Free space of the disk below it."""
        path = self._path
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


class RemoteFolder:
    """A folder behind fsspec; there is no rename, so a folder counts once its last file is there."""

    renames = False

    def __init__(self, system: Any, path: str, where: str) -> None:
        self.where: Where = where
        self._system, self._root = system, path.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""
        path = self._path(name)
        return int(self._system.size(path)) if self._system.isfile(path) else None

    def read(self, name: str, start: int, count: int) -> bytearray:
        """Some bytes of a file, fewer at its end."""
        return bytearray(self._system.cat_file(self._path(name), start=start, end=start + count))

    def read_into(self, name: str, start: int, buffer: memoryview, *, seen: Seen = unseen) -> int:
        """Fill `buffer` from a file; returns how many bytes there were, each of which `seen` was shown."""
        found = self.read(name, start, len(buffer))
        buffer[: len(found)] = found
        seen(buffer[: len(found)])
        return len(found)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A local scratch file, uploaded when it is left without error: stores cannot seek back."""
        with tempfile.NamedTemporaryFile(prefix="longctx-upload-") as scratch:
            yield scratch  # type: ignore[misc]
            scratch.flush()
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._system.put_file(scratch.name, self._path(name))

    def names(self) -> list[str]:
        """Names directly inside, files and folders, sorted."""
        self._system.invalidate_cache()
        if not self._system.isdir(self._root):
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(self._root, False))

    def folder(self, name: str) -> "RemoteFolder":
        """A folder inside, which need not exist."""
        return RemoteFolder(self._system, self._path(name), f"{str(self.where).rstrip('/')}/{name}")

    def make(self) -> None:
        """Remove what was there; object stores have no empty folders."""
        self.remove()
        self._system.makedirs(self._root, exist_ok=True)

    def remove(self, name: str = "") -> None:
        """Remove a file or folder inside, or the folder itself; nothing happens if it is not there."""
        if self._system.exists(self._path(name)):
            self._system.rm(self._path(name), recursive=True)

    def publish(self, name: str, final: str) -> None:
        """Refused: object stores cannot rename; callers ask `renames` first."""
        raise UnsupportedOperation(f"{self.where} cannot rename {name} to {final}")

    def free_bytes(self) -> int | None:
        """Unknown."""
        return None


def _remote(url: str) -> RemoteFolder:
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{url} needs a package: {error}; install it, or use a local path") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}; use a local path, or a protocol that fsspec knows") from error
    return RemoteFolder(system, path, url)


def read_whole(folder: Folder, name: str) -> bytes:
    """All bytes of a small file.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    try:
        size = folder.size(name)
        if size is None:
            raise CheckpointError(f"{folder.where}/{name} is missing")
        return bytes(folder.read(name, 0, size))
    except OSError as error:
        raise CheckpointError(f"{folder.where}/{name} cannot be read: {error}") from error


def write_whole(folder: Folder, name: str, content: bytes) -> None:
    """A small file in one step."""
    with folder.create(name) as file:
        file.write(content)
