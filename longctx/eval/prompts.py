"""Prompts of a wanted length in tokens: noise is added until one more unit would not fit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data.tokenizers import Tokenizer
from ..errors import ConfigError
from .score import IGNORED, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A task in text."""

    text: str
    """Context and question, up to where the answer begins."""
    answers: tuple[str, ...]
    """What follows, in this order, separated by commas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A task in tokens."""

    prompt: Prompt
    """Its text."""
    row: Row
    """Labels are numbers of answers."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answers."""
        return len(self.row.ids)


def encode(prompt: Prompt, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a prompt and its answers; only answers have labels."""
    parts = [tokenizer.encode(prompt.text)]
    parts += [tokenizer.encode((", " if i else " ") + answer) for i, answer in enumerate(prompt.answers)]
    ids = torch.cat([torch.from_numpy(part.copy()) for part in parts])
    owner = torch.repeat_interleave(
        torch.arange(IGNORED, len(prompt.answers)), torch.tensor([len(part) for part in parts])
    )
    return Encoded(prompt=prompt, row=Row(ids=ids, labels=owner[1:]))  # a label is of the token that follows


def fit(make: Callable[[int], Prompt], tokenizer: Tokenizer, length: int) -> Encoded:
    """The longest prompt of at most `length` tokens, answers included.

    Args:
        make: a prompt with this much noise; more units never make it shorter.
        tokenizer: counts.
        length: tokens.

    Raises:
        ConfigError: without any noise it is longer already.
    """
    best = encode(make(0), tokenizer)
    if best.num_tokens > length:
        raise ConfigError(
            f"a prompt of this task has at least {best.num_tokens} tokens with data.tokenizer="
            f"{tokenizer.name}, more than eval.lengths={length}; choose longer eval.lengths"
        )
    low, high = 0, 1
    while True:  # doubled from below: no try is much longer than the prompt that is wanted
        tried = encode(make(high), tokenizer)
        if tried.num_tokens > length:
            break
        low, high, best = high, 2 * high, tried
    while high - low > 1:
        middle = (low + high) // 2
        tried = encode(make(middle), tokenizer)
        if tried.num_tokens > length:
            high = middle
        else:
            low, best = middle, tried
    return best
