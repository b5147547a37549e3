"""Tokens of documents on disk: Megatron-core's `.bin/.idx` pair, memory-mapped, with our side files.

Beside PREFIX.bin (tokens) and PREFIX.idx (see `index`) a store written here has

- PREFIX.json: `meta`, with sizes and checksums of every file, its own checksum, the tokenizer, totals;
- PREFIX.documents.npy: one `RECORD` per document;
- PREFIX.files.jsonl: one JSON string per source file, to which the records point;
- PREFIX.spans (optional, see `spans`): which tokens are trained.

A pair without PREFIX.json, as Megatron-core writes it, is read as well: sizes are checked, content
cannot be.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import DataError
from .files import BLOCK_BYTES, hash_block, hash_blocks
from .index import Index, Int64s, read_index
from .spans import Spans, read_spans

FORMAT = "longctx-store"
VERSION = 1
VERIFY_WHOLE_BYTES = 4 << 30
"""`Store.verify("auto")` reads a token file up to this size whole, and this much of a larger one."""
RECORD = np.dtype([("text_bytes", "<i8"), ("text_hash", "<u8"), ("file", "<i4"), ("line", "<i4")])
"""Per document: UTF-8 bytes and xxh3-64 of its text, source file, line in it (0: the whole file)."""
SIDE_FILES = (".bin", ".idx", ".documents.npy", ".files.jsonl")
Verify = Literal["auto", "whole", "sizes"]


class Store:
    """Documents of a store; opening it checks names, sizes and the index, reading it maps pages."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.meta = read_meta(prefix)
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise DataError(
                    f"{prefix}{suffix} is missing; a store is a .bin and an .idx of the same name"
                )
        self._check_sizes()
        self.index: Index = read_index(Path(prefix + ".idx"))
        size = Path(prefix + ".bin").stat().st_size
        if size != self.index.bin_bytes:
            raise DataError(
                f"{prefix}.bin has {size:,} bytes, its index describes {self.index.bin_bytes:,}: truncated "
                f"or of another store; {_AGAIN}"
            )
        if size == 0:
            raise DataError(f"{prefix}.bin holds no tokens; choose another data.path")
        # A plain view: slicing numpy's memmap class costs more than reading a short document.
        self._tokens = np.asarray(np.memmap(prefix + ".bin", dtype=self.index.dtype, mode="r"))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.index.lengths)

    @property
    def lengths(self) -> Int64s:
        """int64 [N]: tokens of each document."""
        return self.index.lengths

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @cached_property
    def records(self) -> npt.NDArray[np.void] | None:
        """`RECORD` [N], or None for a store that came without side files."""
        if self.meta is None:
            return None
        records: npt.NDArray[np.void] = np.load(
            self.prefix + ".documents.npy", mmap_mode="r", allow_pickle=False
        )
        if records.dtype != RECORD or len(records) != len(self):
            raise DataError(
                f"{self.prefix}.documents.npy does not describe these {len(self):,} documents; {_AGAIN}"
            )
        return records

    @cached_property
    def text_bytes(self) -> Int64s | None:
        """int64 [N]: UTF-8 bytes of each document's text; None where nobody recorded them."""
        return None if self.records is None else np.asarray(self.records["text_bytes"], dtype=np.int64)

    @cached_property
    def spans(self) -> Spans | None:
        """Which tokens are trained; None: all of them."""
        path = Path(self.prefix + ".spans")
        return read_spans(path, Path(self.prefix + ".idx"), self.lengths) if path.exists() else None

    def document(self, number: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Tokens [start, stop) of a document, a view of the mapped file in its dtype."""
        length = int(self.lengths[number])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}..{stop} of document {number}, which has {length}")
        first = int(self.index.starts[number])
        return self._tokens[first + start : first + stop]

    def name(self, number: int) -> str:
        """What to call a document in a message: its file (and line), else its number."""
        if self.records is None:
            return f"{Path(self.prefix).name} document {number}"
        record = self.records[number]
        file = self._files[int(record["file"])]
        return f"{file}:{int(record['line'])}" if record["line"] else file

    @cached_property
    def _files(self) -> list[str]:
        with Path(self.prefix + ".files.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def max_token(self) -> int:
        """Largest token id: recorded, else the largest found in the blocks that `verify` would read."""
        if self.meta is not None:
            return int(self.meta["max_token"])
        return max(int(self._block(block).max()) for block in self._sample("auto"))

    @property
    def _block_tokens(self) -> int:
        return BLOCK_BYTES // self.index.dtype.itemsize

    @property
    def _num_blocks(self) -> int:
        return -(-len(self._tokens) // self._block_tokens)

    def _block(self, block: int) -> npt.NDArray[Any]:
        return self._tokens[block * self._block_tokens : (block + 1) * self._block_tokens]

    def _sample(self, how: Verify) -> list[int]:
        """Blocks of the token file to look at, spread evenly."""
        count = (
            self._num_blocks if how == "whole" else min(self._num_blocks, VERIFY_WHOLE_BYTES // BLOCK_BYTES)
        )
        chosen: list[int] = np.linspace(0, self._num_blocks - 1, count).astype(int).tolist()
        return chosen

    def outside_vocab(self, number: int, token: int, vocab_size: int) -> str:
        """Message about a token id that is not in the model's vocabulary."""
        return (
            f"{self.prefix}: token {token} in {self.name(number)} is not in model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {self.max_token() + 1}, or prepare with the model's tokenizer"
        )

    def verify(self, how: Verify = "auto") -> None:
        """Compare the files with their recorded checksums.

        Args:
            how: `whole` reads everything; `auto` reads token files up to `VERIFY_WHOLE_BYTES` whole and as
                much of larger ones, in blocks spread evenly; `sizes` reads nothing (opening does that).

        Raises:
            DataError: naming the damaged file and, inside the token file, the place.
        """
        if self.meta is None or how == "sizes":
            return
        for suffix, recorded in self.meta["files"].items():
            path = Path(self.prefix + suffix)
            if suffix != ".bin" and hash_blocks(path) != recorded["xxh3_64"]:
                raise DataError(f"{path} is damaged: its checksum differs from {self.prefix}.json; {_AGAIN}")
        blocks = self.meta["files"][".bin"]["xxh3_64"]
        for block in self._sample(how):
            if hash_block(Path(self.prefix + ".bin"), block) != blocks[block]:
                raise DataError(
                    f"{self.prefix}.bin is damaged in bytes {block * BLOCK_BYTES:,} to "
                    f"{(block + 1) * BLOCK_BYTES:,}: the checksum differs; {_AGAIN}"
                )

    def _check_sizes(self) -> None:
        for suffix, recorded in (self.meta or {"files": {}})["files"].items():
            path = Path(self.prefix + suffix)
            size = path.stat().st_size if path.is_file() else None
            if size != recorded["size"]:
                state = (
                    "is missing" if size is None else f"has {size:,} bytes instead of {recorded['size']:,}"
                )
                raise DataError(f"{path} {state}; {_AGAIN}")


_PAIR = "a store is a .bin and an .idx of the same name"
_AGAIN = "delete the store and run `longctx prepare` again, or restore the file"


def read_meta(prefix: str) -> Mapping[str, Any] | None:
    """Contents of PREFIX.json; None where the pair came without ours.

    Raises:
        DataError: it is ours but damaged, or of a newer version.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not readable as JSON ({error}); {_AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return None
    if meta.get("version") != VERSION:
        raise DataError(
            f"{path}: store version {meta.get('version')}, this program reads {VERSION}; {_AGAIN}"
        )
    if meta.pop("xxh3_64", None) != meta_digest(meta):
        raise DataError(f"{path} is damaged: its checksum does not match its content; {_AGAIN}")
    return meta


def meta_digest(meta: Mapping[str, Any]) -> str:
    """xxh3-64 of a meta record without its own digest."""
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def store_prefix(path: str) -> str | None:
    """The prefix that a data path means if it names a store (with or without .bin/.idx), else None."""
    prefix = str(Path(path).expanduser())
    prefix = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
    present = [Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")]
    if present == [True, False] or present == [False, True]:
        missing = prefix + (".idx" if present[0] else ".bin")
        raise DataError(
            f"data.path={path}: {missing} is missing; a store is a .bin and an .idx of the same name"
        )
    return prefix if all(present) else None
