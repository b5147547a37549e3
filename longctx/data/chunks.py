"""A source cut into shares that processes read independently, and the reading itself.

A chunk is some whole text files, a byte range of a JSON lines file, or, since a compressed file
cannot be entered in the middle, the lines themselves. The cut depends on the listing alone.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .documents import Source, SourceFile

_PROBE_BYTES = 8192
_MAX_FILES = 4096
_Raw = TypeVar("_Raw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A share of a source."""

    files: tuple[SourceFile, ...]
    """Whole text files, or the one file that the lines belong to."""
    first_file: int
    """Number of the first of them in the source."""
    weight: int
    """Bytes on disk, for the progress display."""
    start: int = 0
    """Byte range of a JSON lines file: the lines that start in [start, stop)."""
    stop: int = 0
    """End of the byte range."""
    lines: bytes | None = None
    """Lines of a compressed file."""
    lines_before: int = 0
    """Lines of the compressed file before these."""
    damage: str = ""
    """Why a compressed file ends after these lines although it should not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Text and where it came from."""

    text: str
    """The document."""
    file: int
    """Number of its file in the source."""
    line: int
    """Line counted from 1 within the chunk's lines; 0: the whole file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Something that cannot be read as a document."""

    file: int
    """Number of the file in the source."""
    line: int
    """Line as in `Document`."""
    reason: str
    """What is wrong with it."""


class _UnusableError(Exception):
    """Why a file or a line is not a document."""


def cut_source(source: Source, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of about `chunk_bytes` in reading order."""
    group: list[SourceFile] = []
    size = 0
    for number, file in enumerate(source.files):
        if file.kind == "text":
            group.append(file)
            size += file.size
            if size >= chunk_bytes or len(group) >= _MAX_FILES:
                yield _whole_files(group, number + 1)
                group, size = [], 0
            continue
        if group:
            yield _whole_files(group, number)
            group, size = [], 0
        cut = _byte_ranges if file.kind == "jsonl" else _compressed_lines
        yield from cut(file, number, chunk_bytes)
    if group:
        yield _whole_files(group, len(source.files))


def read_chunk(chunk: Chunk, text_key: str) -> tuple[list[Document | Skip], int]:
    """Read a chunk.

    Args:
        chunk: of `cut_source`.
        text_key: key of the text in a JSON line.

    Returns:
        Documents and what could not be used, in order; the number of lines seen (0 for text files).
    """
    if chunk.files[0].kind == "text":
        numbered = enumerate(chunk.files, start=chunk.first_file)
        return [item for n, file in numbered for item in _use(_read_text, file, n, 0)], 0
    try:
        lines = _lines(chunk)
    except OSError as error:
        return [Skip(file=chunk.first_file, line=0, reason=f"cannot be read: {error.strerror}")], 0

    def parse(raw: bytes) -> str:
        return _parse_line(raw, text_key)

    found = [
        item
        for number, raw in enumerate(lines, start=1)
        if raw.strip()
        for item in _use(parse, raw, chunk.first_file, number)
    ]
    if chunk.damage:
        found.append(Skip(file=chunk.first_file, line=len(lines) + 1, reason=chunk.damage))
    return found, len(lines)


def _use(read: Callable[[_Raw], str], raw: _Raw, file: int, line: int) -> list[Document | Skip]:
    """The document, what is wrong with it, or nothing where there is no text."""
    try:
        text = read(raw)
    except _UnusableError as error:
        return [Skip(file=file, line=line, reason=str(error))]
    return [Document(text=text, file=file, line=line)] if text else []


def lines_before(chunk: Chunk) -> int:
    """Number of lines of its file before the chunk; of a plain file they are counted by reading them."""
    if chunk.lines is not None:
        return chunk.lines_before
    with Path(chunk.files[0].path).open("rb") as file:
        left = _first_byte(file, chunk.start)
        file.seek(0)
        count = 0
        while left and (data := file.read(min(left, 1 << 22))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def _whole_files(files: list[SourceFile], end: int) -> Chunk:
    return Chunk(files=tuple(files), first_file=end - len(files), weight=sum(f.size for f in files))


def _byte_ranges(file: SourceFile, number: int, chunk_bytes: int) -> Iterator[Chunk]:
    for start in range(0, max(1, file.size), chunk_bytes):
        stop = min(start + chunk_bytes, file.size)
        yield Chunk(files=(file,), first_file=number, weight=stop - start, start=start, stop=stop)


def _compressed_lines(file: SourceFile, number: int, chunk_bytes: int) -> Iterator[Chunk]:
    lines: list[bytes] = []
    size = seen = before = 0
    damage = ""

    def chunk(weight: int) -> Chunk:
        data = b"".join(lines)
        return Chunk(
            files=(file,), first_file=number, weight=weight, lines=data, lines_before=before, damage=damage
        )

    try:
        with Path(file.path).open("rb") as raw, gzip.open(raw) as stream:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= chunk_bytes:
                    position = raw.tell()
                    yield chunk(position - seen)
                    before += len(lines)
                    lines, size, seen = [], 0, position
    except (OSError, EOFError, zlib.error) as error:
        damage = f"not a whole gzip file ({error})"
    yield chunk(file.size - seen)


def _lines(chunk: Chunk) -> list[bytes]:
    if chunk.lines is not None:
        return io.BytesIO(chunk.lines).readlines()
    with Path(chunk.files[0].path).open("rb") as file:
        _first_byte(file, chunk.start)
        lines = []
        while file.tell() < chunk.stop and (line := file.readline()):
            lines.append(line)
    return lines


def _first_byte(file: Any, start: int) -> int:
    """Move to the first line that starts at or after `start`."""
    if start:
        file.seek(start - 1)
        file.readline()
    return int(file.tell())


def _read_text(file: SourceFile) -> str:
    try:
        with Path(file.path).open("rb") as stream:
            data = stream.read(_PROBE_BYTES)
            if b"\0" in data:
                raise _UnusableError("binary (it holds zero bytes)")
            data += stream.read()
    except OSError as error:
        raise _UnusableError(f"cannot be read: {error.strerror}") from error
    if b"\0" in data:
        raise _UnusableError("binary (it holds zero bytes)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnusableError(f"not UTF-8 (byte {error.start})") from error


def _parse_line(raw: bytes, text_key: str) -> str:
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _UnusableError(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON ({error})") from error
    text = entry.get(text_key) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        has = ", ".join(list(entry)[:8]) if isinstance(entry, dict) else type(entry).__name__
        raise _UnusableError(f'no text under "{text_key}" (data.text_key); the line has {has}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _UnusableError("half of a surrogate pair, which UTF-8 cannot hold") from error
    return text
