"""Where documents come from: a folder of text, JSON lines, or Python's own standard library.

A source lists its files in one fixed order; `chunks` shares it out among processes and reads it.
"""

import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError

STDLIB = "python-stdlib"
JSONL = (".jsonl", ".ndjson")
_STDLIB_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
Kind = Literal["text", "jsonl", "jsonl.gz"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source."""

    path: str
    """Where it is."""
    name: str
    """Path relative to the source, with forward slashes: what messages call it."""
    kind: Kind
    """`text` is one document, the others hold one per line."""
    size: int
    """Bytes on disk."""
    mtime_ns: int
    """Time of the last change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Files in reading order."""

    path: str
    """As configured: `python-stdlib`, a file, or a folder."""
    files: tuple[SourceFile, ...]
    """Sorted by name."""
    text_key: str
    """Key of the text in a JSON line."""

    @property
    def size(self) -> int:
        """Bytes of all files on disk."""
        return sum(file.size for file in self.files)


def open_source(path: str, text_key: str = "text", *, leave_out: Path | None = None) -> Source:
    """List the files of a source.

    Args:
        path: `python-stdlib`, a folder (read recursively: .jsonl, .ndjson and their .gz hold one document
            per line, every other file is one document; hidden files and folders are left out), or a file.
        text_key: key of the text in a JSON line.
        leave_out: a folder that is not read even if it lies inside.

    Raises:
        DataError: nothing there, not readable, or no file in it.
    """
    stdlib = path == STDLIB
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib else Path(path).expanduser()
    if not root.exists():
        raise DataError(
            f"data.path={path} does not exist; set it to a folder of text, a .jsonl or .jsonl.gz file, a "
            f"store prefix (PREFIX.bin and PREFIX.idx), or `{STDLIB}`"
        )
    left_out = leave_out.resolve() if leave_out else None
    wanted = _stdlib_name if stdlib else _visible_name
    names = list(_walk(root, path, wanted, left_out)) if root.is_dir() else [root.name]
    base = root if root.is_dir() else root.parent
    files = [_source_file(base, name) for name in sorted(names) if not stdlib or name.endswith(".py")]
    readable = tuple(file for file in files if file is not None)
    if not readable:
        raise DataError(f"data.path={path} holds no file to read; put text or .jsonl files into it")
    return Source(path=path, files=readable, text_key=text_key)


def _walk(root: Path, path: str, wanted: Callable[[str], bool], left_out: Path | None) -> Iterator[str]:
    """Names of the files under a folder, relative to it, in no particular order."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data.path={path}: folder {error.filename} cannot be read ({error.strerror}); make it "
            f"readable, or move it out of the way"
        ) from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if wanted(name)]
        if left_out is not None:
            folders[:] = [name for name in folders if Path(folder, name).resolve() != left_out]
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in files if wanted(name))


def _visible_name(name: str) -> bool:
    return not name.startswith(".")


def _stdlib_name(name: str) -> bool:
    return name not in _STDLIB_LEFT_OUT


def _source_file(base: Path, name: str) -> SourceFile | None:
    """The file's listing; None for a pipe or a socket. What cannot be read is named when it is read."""
    path = base / name
    try:
        info = path.stat()
    except OSError:
        return SourceFile(path=str(path), name=name, kind="text", size=0, mtime_ns=0)
    if not stat.S_ISREG(info.st_mode):
        return None
    lower = name.lower()
    plain = lower.removesuffix(".gz")
    kind: Kind = "text"
    if plain.endswith(JSONL):
        kind = "jsonl" if plain == lower else "jsonl.gz"
    return SourceFile(path=str(path), name=name, kind=kind, size=info.st_size, mtime_ns=info.st_mtime_ns)
