"""Named sources of documents, each with its own store, read as one corpus.

Documents are numbered through: the stores in the order of `data.sources`, each in its own order. Only
the stores' indexes are joined; tokens stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .index import Int64s
from .prepare import Prepared, prepare
from .store import Store
from .tokens import Masks, Tokens

if TYPE_CHECKING:
    from ..config.schema import DataConfig


class Corpus:
    """Several stores as one; also the `Masks` of all of them."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self.first: Int64s = np.cumsum([0, *(len(store) for store in stores)]).astype(np.int64)
        """int64 [S+1]: number of each store's first document, then of all documents."""
        self.lengths: Int64s = np.concatenate([store.lengths for store in stores]).astype(np.int64)

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @cached_property
    def text_bytes(self) -> Int64s | None:
        """int64 [N]: UTF-8 bytes of each document's text; None where one store has no record."""
        columns = [column for store in self.stores if (column := store.text_bytes) is not None]
        return np.concatenate(columns) if len(columns) == len(self.stores) else None

    @cached_property
    def spans(self) -> "Masks | None":
        """Itself where any store has loss spans."""
        return self if any(store.spans is not None for store in self.stores) else None

    def mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Bool [stop - start]: which of the document's tokens are trained."""
        store, number = self._find(document)
        if store.spans is None:
            return np.ones(stop - start, dtype=np.bool_)
        return store.spans.mask(number, start, stop)

    def document(self, number: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Tokens [start, stop) of a document, a view of its store's mapped file."""
        store, own = self._find(number)
        return store.document(own, start, stop)

    def name(self, number: int) -> str:
        """What to call a document in a message."""
        store, own = self._find(number)
        return store.name(own)

    def outside_vocab(self, number: int, token: int, vocab_size: int) -> str:
        """Message about a token id that is not in the model's vocabulary."""
        store, own = self._find(number)
        return store.outside_vocab(own, token, vocab_size)

    def source_of(self, documents: Int64s) -> Int64s:
        """int64 [n]: number of the store that holds each document."""
        return (np.searchsorted(self.first, documents, side="right") - 1).astype(np.int64)

    def _find(self, number: int) -> tuple[Store, int]:
        place = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.stores[place], number - int(self.first[place])


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The data of a run: one store, or several as one."""

    tokens: Tokens
    """All documents."""
    train_docs: Int64s
    """int64: numbers of the documents to train on, ascending."""
    held_out_docs: Int64s
    """int64: numbers of the documents kept for evaluation, ascending."""
    source: Int64s
    """int64: number of the source of each document in `train_docs`."""
    names: tuple[str, ...]
    """Names of the sources."""
    vocab_size: int
    """Largest of the sources'."""
    tokenizer: str | None
    """For `load_tokenizer`; None where a source is a foreign store that it did not make."""


def open_data(config: "DataConfig", *, progress: bool = False) -> Opened:
    """Prepare `data.path`, or every one of `data.sources`, and open what was prepared.

    Raises:
        ConfigError: two sources have one name, or a source has no path.
        DataError: see `prepare`.
    """
    if not config.sources:
        return _joined(("data",), [prepare(config, progress=progress)])
    names = tuple(source.name for source in config.sources)
    twice = sorted({name for name in names if names.count(name) > 1 or not name})
    if twice:
        raise ConfigError(f"data.sources needs a different name for each source; {twice} is not")
    prepared = [
        prepare(replace(config, path=source.path, sources=[]), progress=progress) for source in config.sources
    ]
    return _joined(names, prepared)


def _joined(names: tuple[str, ...], prepared: list[Prepared]) -> Opened:
    stores = [Store(each.prefix) for each in prepared]
    corpus = Corpus(stores)
    train = [each.train_docs + first for each, first in zip(prepared, corpus.first, strict=False)]
    held_out = [each.held_out_docs + first for each, first in zip(prepared, corpus.first, strict=False)]
    tokenizers = [each.tokenizer for each in prepared]
    return Opened(
        tokens=stores[0] if len(stores) == 1 else corpus,
        train_docs=np.concatenate(train),
        held_out_docs=np.concatenate(held_out),
        source=np.repeat(np.arange(len(train)), [len(docs) for docs in train]).astype(np.int64),
        names=names,
        vocab_size=max(each.vocab_size for each in prepared),
        tokenizer=tokenizers[0] if None not in tokenizers else None,
    )
