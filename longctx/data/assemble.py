"""Tokenize a listed source into a new store, going on from chunks that an earlier run finished."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .chunks import Chunk, Skip, cut_source, lines_before
from .documents import Source
from .files import named_disk_full
from .progress import Progress, open_progress
from .shards import load_shard
from .tokenizers import Tokenizer, load_tokenizer
from .workers import tokenize_all
from .writer import Documents, NoDocumentsError, write_store

if TYPE_CHECKING:
    from ..config.schema import DataConfig

_MIN_CHUNK, _MAX_CHUNK, _CHUNKS = 4 << 20, 64 << 20, 4096
_NAMED = 1000
"""So many skipped files or lines are recorded by name; all are counted."""
Plan = list[tuple[Path, int]]
"""Shard files in reading order, each with the number of its first source file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Where finished chunks wait; chunks of another size are other chunks."""

    folder: Path
    """Holds one shard per chunk."""
    chunk_bytes: int
    """Text per chunk."""


def assemble(
    prefix: str, source: Source, config: "DataConfig", *, progress: bool, chunk_bytes: int | None
) -> None:
    """Make the store `prefix`; see `prepare` for the arguments and errors."""
    if chunk_bytes is None:
        chunk_bytes = min(max(_MIN_CHUNK, source.size // _CHUNKS), _MAX_CHUNK)
    work = Work(folder=Path(f"{prefix}.work-{chunk_bytes}"), chunk_bytes=chunk_bytes)
    tokenizer = load_tokenizer(config.tokenizer)
    _remove_partial(prefix)
    try:
        with named_disk_full(work.folder):
            work.folder.mkdir(exist_ok=True)
            with open_progress(f"tokenizing {source.path}", source.size, show=progress) as advance:
                plan = _tokenize(work, source, config, tokenizer=tokenizer, advance=advance)
            _merge(prefix, plan, source, tokenizer)
    finally:
        _remove_partial(prefix)


def remove_work(prefix: str) -> None:
    """Remove the chunks of a complete store."""
    for folder in Path(prefix).parent.glob(f"{Path(prefix).name}.work-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_partial(prefix: str) -> None:
    """Remove files that a killed process was in the middle of."""
    path = Path(prefix)
    for pattern in (f"{path.name}.*.tmp", f"{path.name}.work-*/*.tmp"):
        for partial in path.parent.glob(pattern):
            partial.unlink(missing_ok=True)


def _tokenize(
    work: Work, source: Source, config: "DataConfig", *, tokenizer: Tokenizer, advance: Progress
) -> Plan:
    """Make the missing shards; returns all of them."""
    plan: Plan = []

    def missing() -> Iterator[tuple[Chunk, Path]]:
        for number, chunk in enumerate(cut_source(source, work.chunk_bytes)):
            path = work.folder / f"{number:08d}.npz"
            plan.append((path, chunk.first_file))
            if path.exists():
                advance(chunk.weight)
            else:
                yield chunk, path

    workers = config.workers or len(os.sched_getaffinity(0))
    workers = max(1, min(workers, -(-source.size // work.chunk_bytes)))
    finished = tokenize_all(missing(), tokenizer=tokenizer, text_key=source.text_key, workers=workers)
    for chunk, skipped in finished:
        advance(chunk.weight)
        if skipped and config.bad_files == "error":
            raise DataError(f"{_named(source, skipped[0], lines_before(chunk))}; {REPAIR}")
    return plan


REPAIR = "repair or remove it, or set data.bad_files=skip"


def _merge(prefix: str, plan: Plan, source: Source, tokenizer: Tokenizer) -> None:
    skipped = _Skipped()
    about = {name: getattr(tokenizer, name) for name in ("name", "fingerprint", "vocab_size", "eos_id")}
    try:
        write_store(
            prefix,
            _parts(plan, source, skipped),
            vocab_size=tokenizer.vocab_size,
            files=[file.name for file in source.files],
            meta=lambda: {"source": source.path, "tokenizer": about, **asdict(skipped)},
        )
    except NoDocumentsError as error:
        why = f"{skipped.num_skipped:,} files or lines are not usable: {'; '.join(skipped.skipped[:3])}"
        raise DataError(
            f"data.path={source.path} holds no text; {why if skipped.skipped else 'put documents into it'}"
        ) from error


@dataclass(slots=True)
class _Skipped:
    """What could not be used, gathered while shards are merged."""

    num_skipped: int = 0
    """All of it."""
    skipped: list[str] = field(default_factory=list)
    """The first `_NAMED`, each with its reason."""

    def add(self, name: str) -> None:
        """Count one, and remember it if there is room."""
        self.num_skipped += 1
        self.skipped += [name] * (len(self.skipped) < _NAMED)


def _parts(plan: Plan, source: Source, skipped: _Skipped) -> Iterator[Documents]:
    """Documents of all shards, lines counted in their file; names of what was skipped are collected."""
    file, before = -1, 0
    for path, first_file in plan:
        if first_file != file:
            file, before = first_file, 0
        shard = load_shard(path)
        records = shard.documents.records.copy()
        records["line"] += before * (records["line"] > 0)
        for skip in shard.skipped:
            skipped.add(_named(source, skip, before))
        before += shard.num_lines
        yield replace(shard.documents, records=records)


def _named(source: Source, skip: Skip, before: int) -> str:
    name = source.files[skip.file].name
    return f"{name}:{skip.line + before}: {skip.reason}" if skip.line else f"{name}: {skip.reason}"
