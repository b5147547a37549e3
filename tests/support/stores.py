"""Small token stores with chosen contents."""

from pathlib import Path

import numpy as np
import xxhash

from longctx.data.store import RECORD, Store
from longctx.data.writer import Documents, write_store


def make_store(prefix: Path, documents, *, vocab_size: int = 257, fingerprint: str = "bytes-1") -> Store:
    """A store of these token lists, each from a file `docN` whose text has one byte less than tokens."""
    records = np.zeros(len(documents), dtype=RECORD)
    for number, (record, document) in enumerate(zip(records, documents, strict=True)):
        record["file"], record["text_bytes"] = number, max(0, len(document) - 1)
        record["text_hash"] = xxhash.xxh3_64_intdigest(np.asarray(document, "<i8").tobytes())
    part = Documents(
        tokens=np.array([token for document in documents for token in document], dtype=np.int64),
        lengths=np.array([len(document) for document in documents], dtype=np.int64),
        records=records,
    )
    tokenizer = {"name": "bytes", "fingerprint": fingerprint, "vocab_size": vocab_size, "eos_id": 256}
    write_store(
        str(prefix),
        [part],
        vocab_size=vocab_size,
        files=[f"doc{number}" for number in range(len(documents))],
        meta=lambda: {"tokenizer": tokenizer, "num_skipped": 0, "skipped": []},
    )
    return Store(str(prefix))


def flip_bit(path: Path, offset: int) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
