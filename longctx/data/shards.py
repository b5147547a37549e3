"""Tokenized chunks: written whole by the process that made them, merged in order at the end.

A shard is an uncompressed .npz without pickle (`tokens`, `lengths`, `records` as in
`writer.Documents`, lines counted inside the chunk, and `info`, JSON with the number of lines and what
was skipped), followed by its xxh3-64. A kill loses the chunks in work, no finished shard.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import DataError
from .chunks import Chunk, Document, Skip, read_chunk
from .files import data_file
from .index import token_dtype
from .store import RECORD
from .tokenizers import Tokenizer
from .writer import Documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tokenized chunk."""

    documents: Documents
    """Tokens, lengths and records; lines are counted inside the chunk."""
    num_lines: int
    """Lines of the chunk."""
    skipped: tuple[Skip, ...]
    """What was not usable."""


def tokenize_chunk(chunk: Chunk, text_key: str, tokenizer: Tokenizer) -> Shard:
    """Read and tokenize a chunk; every document ends with the tokenizer's end of document."""
    found, num_lines = read_chunk(chunk, text_key)
    texts = [item for item in found if isinstance(item, Document)]
    records = np.zeros(len(texts), dtype=RECORD)
    tokens: list[npt.NDArray[Any]] = []
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id], dtype=dtype)
    for record, document in zip(records, texts, strict=True):
        data = document.text.encode()
        record["text_bytes"], record["text_hash"] = len(data), xxhash.xxh3_64_intdigest(data)
        record["file"], record["line"] = document.file, document.line
        tokens += [np.asarray(tokenizer.encode(document.text), dtype=dtype), end]
    lengths = np.array([len(part) + 1 for part in tokens[::2]], dtype=np.int64)
    merged = np.concatenate(tokens) if tokens else np.zeros(0, dtype=dtype)
    return Shard(
        documents=Documents(tokens=merged, lengths=lengths, records=records),
        num_lines=num_lines,
        skipped=tuple(item for item in found if isinstance(item, Skip)),
    )


def save_shard(path: Path, shard: Shard) -> None:
    """Write a shard, whole or not at all."""
    skipped = [[skip.file, skip.line, skip.reason] for skip in shard.skipped]
    info = json.dumps({"num_lines": shard.num_lines, "skipped": skipped}).encode()
    content = io.BytesIO()
    np.savez(
        content,
        tokens=shard.documents.tokens,
        lengths=shard.documents.lengths,
        records=shard.documents.records,
        info=np.frombuffer(info, dtype=np.uint8),
    )
    with data_file(path) as file:
        file.write(content.getbuffer())
        file.write(xxhash.xxh3_64_digest(content.getbuffer()))


def load_shard(path: Path) -> Shard:
    """Read a shard.

    Raises:
        DataError: it is damaged; it is deleted, so that the next run makes it again.
    """
    data = path.read_bytes()
    if xxhash.xxh3_64_digest(data[:-8]) != data[-8:]:
        path.unlink()
        raise DataError(f"{path} was damaged and is deleted; run the same command again to make it anew")
    with np.load(io.BytesIO(data[:-8]), allow_pickle=False) as arrays:
        info = json.loads(arrays["info"].tobytes())
        documents = Documents(tokens=arrays["tokens"], lengths=arrays["lengths"], records=arrays["records"])
    skipped = tuple(Skip(file=file, line=line, reason=reason) for file, line, reason in info["skipped"])
    return Shard(documents=documents, num_lines=info["num_lines"], skipped=skipped)
