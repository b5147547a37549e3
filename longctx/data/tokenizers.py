"""Text to token ids: raw bytes, or any `tokenizer.json` of the `tokenizers` library.

No special tokens are added, nothing is truncated, and text that happens to spell a special token
(`</s>` in a web page) stays text: only the store ends a document, with `eos_id`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import DataError

Ids = npt.NDArray[np.int64]
BYTES = "bytes"
EOS_NAMES = (
    "</s>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<eos>",
    "<|eot_id|>",
    "[EOS]",
    "<|end|>",
    "[SEP]",
)
"""Names of an end-of-document token, tried in this order where no tokenizer_config.json names one."""


class Tokenizer(Protocol):
    """What the data room asks of a tokenizer."""

    @property
    def name(self) -> str:
        """`bytes`, or the path of the file."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""

    def encode(self, text: str) -> Ids:
        """Ids int64 [n] of a text, without an end of document."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; the end of document and broken characters do not raise."""


class BytesTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""

    name = BYTES
    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes-1"

    def encode(self, text: str) -> Ids:
        """Ids int64 [n]: the bytes of the text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids above 255 vanish, a character cut at an edge becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        import tokenizers  # 60 ms that runs on bytes do not need

        self.name = str(path)
        self.fingerprint = fingerprint(str(path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"data.tokenizer={path} cannot be read by the tokenizers library ({error}); set it to "
                f"`bytes` or to a tokenizer.json"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos_id = vocab[_eos_name(path, vocab)]

    def encode(self, text: str) -> Ids:
        """Ids int64 [n] of a text."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens left out."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `bytes`, or the one in a tokenizer.json.

    Args:
        name: `bytes`, the path of a tokenizer.json, or of a folder that holds one.

    Raises:
        DataError: no such file, not a tokenizer, or no end-of-document token found.
    """
    return BytesTokenizer() if name == BYTES else FileTokenizer(tokenizer_path(name))


def fingerprint(name: str) -> str:
    """Fingerprint of a tokenizer without loading it: xxh3-128 of what decides its ids.

    The tokenizer_config.json beside the file counts, because it may name the end of document.
    """
    if name == BYTES:
        return BytesTokenizer.fingerprint
    path = tokenizer_path(name)
    hasher = xxhash.xxh3_128(path.read_bytes())
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        hasher.update(beside.read_bytes())
    return hasher.hexdigest()


def tokenizer_path(name: str) -> Path:
    """The tokenizer.json that a configured name means."""
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"data.tokenizer={name}: no such file; set it to `bytes`, to the path of a tokenizer.json, or to "
            f"a folder that holds one"
        )
    return path


def _eos_name(path: Path, vocab: dict[str, int]) -> str:
    configured = _configured_eos(path.with_name("tokenizer_config.json"))
    names = (configured,) if configured else EOS_NAMES
    for name in names:
        if name in vocab:
            return name
    raise DataError(
        f"data.tokenizer={path}: {' or '.join(names)} is not in its vocabulary, so nothing can end a "
        f'document; put a tokenizer_config.json with the right {{"eos_token": "NAME"}} beside it'
    )


def _configured_eos(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        eos = config.get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object ({error}); repair it or take it away") from error
    return eos.get("content") if isinstance(eos, dict) else eos
