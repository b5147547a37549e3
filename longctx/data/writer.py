"""Writing a store: tokens stream into PREFIX.bin, the side files follow, PREFIX.json last."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .files import BlockHasher, data_file, hash_blocks
from .index import Int64s, token_dtype, write_index
from .store import FORMAT, RECORD, SIDE_FILES, VERSION, meta_digest


class NoDocumentsError(DataError):
    """A store of nothing was to be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Consecutive tokenized documents."""

    tokens: npt.NDArray[Any]
    """[sum(lengths)]: ids of all documents, each ending with its end-of-document id."""
    lengths: Int64s
    """int64 [n]: tokens of each document."""
    records: npt.NDArray[np.void]
    """`store.RECORD` [n]."""


def write_store(
    prefix: str,
    parts: Iterable[Documents],
    *,
    vocab_size: int,
    files: Sequence[str],
    meta: Callable[[], Mapping[str, Any]],
) -> None:
    """Write a store; a reader sees all of it or none.

    Args:
        prefix: path without suffix; its folder is created.
        parts: documents in order.
        vocab_size: decides the type of a token on disk.
        files: names of the source files that the records point to.
        meta: makes more entries for PREFIX.json, called after the last part.

    Raises:
        NoDocumentsError: there is nothing to write.
        DataError: a token is not in the vocabulary, or the disk is full.
    """
    path = Path(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", *SIDE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    dtype = token_dtype(vocab_size)
    hasher = BlockHasher()
    with data_file(Path(prefix + ".bin")) as file:
        lengths, records, max_token = _stream(file, parts, hasher, dtype)
        if max_token >= vocab_size:
            raise DataError(
                f"{prefix}: the tokenizer made id {max_token}, its vocabulary has {vocab_size} ids"
            )
        if not len(lengths):
            raise NoDocumentsError(f"{prefix}: there are no documents to write")
    _write(prefix + ".documents.npy", lambda file: np.save(file, records, allow_pickle=False))
    _write(
        prefix + ".files.jsonl", lambda file: file.writelines(json.dumps(f).encode() + b"\n" for f in files)
    )
    _write(prefix + ".idx", lambda file: write_index(file, lengths, dtype))
    totals = {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "text_bytes": int(records["text_bytes"].sum()),
        "max_token": max_token,
        "dtype": dtype.name,
    }
    content = {"format": FORMAT, "version": VERSION, **totals, **meta(), "files": _checksums(prefix, hasher)}
    content["xxh3_64"] = meta_digest(content)
    _write(prefix + ".json", lambda file: file.write(json.dumps(content, indent=1, sort_keys=True).encode()))


def _stream(
    file: BinaryIO, parts: Iterable[Documents], hasher: BlockHasher, dtype: np.dtype[Any]
) -> tuple[Int64s, npt.NDArray[np.void], int]:
    lengths = [np.zeros(0, dtype=np.int64)]
    records = [np.zeros(0, dtype=RECORD)]
    max_token = 0
    for part in parts:
        if len(part.tokens):
            max_token = max(max_token, int(part.tokens.max()))
        data = np.ascontiguousarray(part.tokens, dtype=dtype).view(np.uint8).data
        hasher.update(data)
        file.write(data)
        lengths.append(part.lengths)
        records.append(part.records)
    return np.concatenate(lengths), np.concatenate(records), max_token


def _checksums(prefix: str, tokens: BlockHasher) -> dict[str, dict[str, Any]]:
    paths = {suffix: Path(prefix + suffix) for suffix in SIDE_FILES}
    digests = {s: tokens.finish() if s == ".bin" else hash_blocks(path) for s, path in paths.items()}
    return {s: {"size": path.stat().st_size, "xxh3_64": digests[s]} for s, path in paths.items()}


def _write(path: str, write: Callable[[BinaryIO], object]) -> None:
    with data_file(Path(path)) as file:
        write(file)
