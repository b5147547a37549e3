"""What the loader needs of a token store, so that one store and several look alike."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .index import Int64s


class Masks(Protocol):
    """Which tokens are trained."""

    def mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Bool [stop - start]: which of the document's tokens are trained."""


class Tokens(Protocol):
    """What the loader needs of a store, or of several."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> Int64s:
        """int64 [N]: tokens of each document."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""

    @property
    def text_bytes(self) -> Int64s | None:
        """int64 [N]: UTF-8 bytes of each document's text; None where nobody recorded them."""

    @property
    def spans(self) -> Masks | None:
        """Which tokens are trained; None: all of them."""

    def document(self, number: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Tokens [start, stop) of a document."""

    def name(self, number: int) -> str:
        """What to call a document in a message."""

    def outside_vocab(self, number: int, token: int, vocab_size: int) -> str:
        """Message about a token id that is not in the model's vocabulary."""
