"""New tokens: more rows in the embedding and the head, each the mean of the rows that are there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..model.params import EMBEDDING, HEAD, vocab_rows
from ..tensors.fill import raw_bytes, read_tensor
from ..tensors.index import TensorIndex
from .folder import TOKENIZER

GROWN = (EMBEDDING, HEAD)
"""Parameters with a row per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTokens:
    """What a list of tokens does to a model."""

    tokenizer: bytes
    """The new tokenizer.json."""
    model: ModelConfig
    """With as many rows as the new tokens need."""
    old_size: int
    """Ids that the tokenizer had."""
    ids: tuple[int, ...]
    """Ids of the new tokens."""


def vocabulary_size(tokenizer: Path) -> int:
    """One more than the largest id of a tokenizer.json.

    Raises:
        ConfigError: the file is none.
    """
    return _size(load_json_tokenizer(tokenizer))


def add_tokens(file: Path, folder: Path, model: ModelConfig) -> AddedTokens:
    """Add the lines of `file` to the tokenizer of a model folder.

    Raises:
        ConfigError: no tokens, no tokenizer.json, or a token that exists already.
    """
    try:
        tokens = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--add-tokens {file} cannot be read ({error}); name a text file") from error
    if not tokens:
        raise ConfigError(f"--add-tokens {file} is empty; write one token per line")
    tokenizer = load_json_tokenizer(folder / TOKENIZER)
    old = _size(tokenizer)
    known = [token for token in tokens if tokenizer.token_to_id(token) is not None]
    if known or len(set(tokens)) != len(tokens):
        raise ConfigError(f"--add-tokens {file}: {(known or tokens)[0]!r} exists already; remove it")
    tokenizer.add_tokens(tokens)
    rows = max(vocab_rows(model), _size(tokenizer))
    return AddedTokens(
        tokenizer=tokenizer.to_str(pretty=True).encode(),
        model=replace(model, vocab_size=rows),
        old_size=old,
        ids=tuple(tokenizer.token_to_id(token) for token in tokens),
    )


def grown_rows(index: TensorIndex, name: str, added: AddedTokens) -> Iterator[memoryview]:
    """A parameter's bytes with the new tokens' rows; one parameter in memory.

    Source: Hewitt, "Initializing new word embeddings for pretrained language models" (2021): at the mean
    the new tokens cannot outweigh all known ones.
    """
    rows = read_tensor(index, name)  # [V, E]
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows[: added.old_size].split(8192):
        total += part.double().sum(0)
    mean = (total / added.old_size).to(rows.dtype)
    extra = vocab_rows(added.model) - len(rows)
    tail = mean.expand(max(0, extra), -1).contiguous()
    for number in added.ids:
        if number < len(rows):
            rows[number] = mean
    yield raw_bytes(rows)
    if extra > 0:
        yield raw_bytes(tail)


def load_json_tokenizer(path: Path) -> Any:  # of the tokenizers library, which has no types
    """The tokenizer in a tokenizer.json.

    Raises:
        ConfigError: the file is none.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} is no tokenizer.json of the tokenizers library ({error})") from error


def _size(tokenizer) -> int:  # type: ignore[no-untyped-def]  # noqa: ANN001
    return 1 + max(map(int, tokenizer.get_vocab(with_added_tokens=True).values()), default=-1)
