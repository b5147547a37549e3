"""Documents to a token store: listed, cut into chunks, tokenized in parallel, merged, split.

The store's name holds a key of everything that decides its content, so a second call finds it and a
changed corpus or tokenizer makes another. Until it is complete, finished chunks wait in a folder
beside it and an interrupted run goes on from them; on disk that needs twice the store for a while.
"""

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..errors import ConfigError, DataError
from .assemble import REPAIR, assemble, remove_work
from .documents import Source, open_source
from .histogram import histogram_text
from .index import Int64s
from .split import hash_numbers, split
from .store import Store, Verify, store_prefix
from .tokenizers import BYTES, fingerprint, load_tokenizer

if TYPE_CHECKING:
    from ..config.schema import DataConfig

_SHOWN = 10
_LAYOUT = 1  # a part of the key: raise it when the same input would give other files


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A complete store and its split."""

    prefix: str
    """Store prefix for `Store`."""
    train_docs: Int64s
    """int64: numbers of the documents to train on, ascending."""
    held_out_docs: Int64s
    """int64: numbers of the documents kept for evaluation, ascending."""
    num_tokens: int
    """Tokens of all documents."""
    vocab_size: int
    """Of the tokenizer; of a store without a record: one more than its largest id."""
    tokenizer: str | None
    """For `load_tokenizer`; None for a foreign store whose ids the configured tokenizer does not make."""
    num_skipped: int
    """Files and lines that were not usable."""
    skipped: tuple[str, ...]
    """The first of them, each with the reason."""
    created: bool
    """Whether this call tokenized, rather than found the store."""


def prepare(
    config: "DataConfig", *, progress: bool = True, verify: Verify = "auto", chunk_bytes: int | None = None
) -> Prepared:
    """Make sure that the tokenized store of a corpus exists and is intact.

    Safe to call from several processes at once: one works, the others wait for it. Interrupted, it goes
    on from the finished chunks; the result does not depend on interruptions, processes or chunk size.

    Args:
        config: section `data`.
        progress: show progress on standard error.
        verify: how thoroughly an existing store is compared with its checksums (`Store.verify`).
        chunk_bytes: text per chunk; by default 4 to 64 MiB, growing with the corpus.

    Raises:
        DataError: missing, unreadable, empty or damaged input, or a full disk.
    """
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"data.held_out={config.held_out} is not a fraction; set it to 0 or more, below 1")
    prefix = store_prefix(config.path)
    if prefix is not None:
        return _open(prefix, config, verify=verify, created=False)
    cache = Path(config.cache_dir).expanduser()
    source = open_source(config.path, config.text_key, leave_out=cache)
    prefix = str(cache / f"{_slug(config.path)}-{_key(source, config)}")
    created = False
    if not Path(prefix + ".json").exists():
        _make_folder(cache)
        with _locked(Path(prefix + ".lock"), progress):
            if not Path(prefix + ".json").exists():
                _assemble(prefix, source, config, progress=progress, chunk_bytes=chunk_bytes)
                created = True
    remove_work(prefix)
    return _open(prefix, config, verify="sizes" if created else verify, created=created)


def describe(prepared: Prepared, seq_len: int) -> str:
    """What was prepared, for a person: length histogram, split, what was skipped."""
    store = Store(prepared.prefix)
    lines = [histogram_text(store.lengths, seq_len)]
    lines.append(
        f"{len(prepared.train_docs):,} documents to train on, {len(prepared.held_out_docs):,} held out; "
        f"store {prepared.prefix}"
    )
    if prepared.num_skipped:
        lines.append(f"{prepared.num_skipped:,} files or lines skipped, named in {prepared.prefix}.json:")
        lines += [f"  {name}" for name in prepared.skipped[:_SHOWN]]
    return "\n".join(lines)


def _open(prefix: str, config: "DataConfig", *, verify: Verify, created: bool) -> Prepared:
    store = Store(prefix)
    store.verify(verify)
    meta: Any = store.meta or {"num_skipped": 0, "skipped": []}
    if meta["num_skipped"] and config.bad_files == "error":
        raise DataError(f"{meta['skipped'][0]}; {REPAIR}")
    hashes = hash_numbers(np.arange(len(store))) if store.records is None else store.records["text_hash"]
    train, held_out = split(np.asarray(hashes), config.held_out)
    vocab_size, tokenizer = _vocabulary(store, config.tokenizer)
    return Prepared(
        prefix=prefix,
        train_docs=train,
        held_out_docs=held_out,
        num_tokens=store.num_tokens,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        num_skipped=meta["num_skipped"],
        skipped=tuple(meta["skipped"]),
        created=created,
    )


def _vocabulary(store: Store, tokenizer: str) -> tuple[int, str | None]:
    """Number of ids, and the tokenizer if it is the one that made them."""
    if store.meta is not None:
        made = store.meta["tokenizer"]
        if made["fingerprint"] != fingerprint(tokenizer):
            raise DataError(
                f"{store.prefix} was made with the tokenizer {made['name']}, data.tokenizer={tokenizer} is "
                f"another; set data.tokenizer to that one, or data.path to the documents"
            )
        return int(made["vocab_size"]), tokenizer
    largest = store.max_token()
    vocab_size = load_tokenizer(tokenizer).vocab_size
    if largest < vocab_size:
        return vocab_size, tokenizer
    if tokenizer == BYTES:  # the default: nothing was said about a store that came without a record
        return largest + 1, None
    raise DataError(
        f"{store.prefix} holds token {largest}, data.tokenizer={tokenizer} has {vocab_size} ids; set "
        f"data.tokenizer to the tokenizer that made the store"
    )


def _assemble(
    prefix: str, source: Source, config: "DataConfig", *, progress: bool, chunk_bytes: int | None
) -> None:
    try:
        assemble(prefix, source, config, progress=progress, chunk_bytes=chunk_bytes)
    except KeyboardInterrupt:
        if progress:
            print(
                "interrupted; finished chunks are kept, the same command goes on from them", file=sys.stderr
            )
        raise


def _slug(path: str) -> str:
    name = Path(path).name or "data"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40]


def _key(source: Source, config: "DataConfig") -> str:
    """Sixteen hexadecimal digits that change with anything that changes the tokens."""
    options = [_LAYOUT, fingerprint(config.tokenizer), config.text_key]
    hasher = xxhash.xxh3_64(json.dumps(options).encode())
    for file in source.files:
        hasher.update(json.dumps([file.name, file.size, file.mtime_ns]).encode())
    return hasher.hexdigest()


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={cache} cannot be created ({error.strerror}); set it to a folder you may write"
        ) from error


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process prepares {path.with_suffix('')}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
