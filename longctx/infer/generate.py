"""Token after token, greedily or at a temperature."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.fsdp import forward_only
from parallel.layout import SequenceLayout

from ..errors import ConfigError
from ..model.params import vocab_rows
from .cache import NewTokens
from .loaded import Loaded


def generate(
    loaded: Loaded, prompt: Sequence[int], *, max_new: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Continue a prompt.

    Args:
        loaded: the model; all ranks call this together and get the same tokens.
        prompt: ids, at least one.
        max_new: most tokens that follow.
        temperature: divides the logits before one is drawn; 0: always the likeliest.
        seed: of the draws.

    Yields:
        One id after the other, without end: whoever asks knows which one ends a text.

    Raises:
        ConfigError: an id without a row in the embedding, or no prompt.

    Cost:
        Keys and values of all tokens stay on every rank; every token gathers each layer once.
    """
    rows = vocab_rows(loaded.model.config)
    if not prompt:
        raise ConfigError("the prompt has no tokens; give --prompt or --file at least one character")
    strays = [each for each in prompt if not 0 <= each < rows]
    if strays:
        raise ConfigError(
            f"the prompt has id {strays[0]}, the model has {rows} rows; name the tokenizer that belongs to it"
        )
    generator = torch.Generator().manual_seed(seed)
    loaded.cache.reset()
    new = list(prompt)
    length = 0
    hook = loaded.model.norm.register_forward_hook(_last_row)
    try:
        for _ in range(max_new):
            length += len(new)
            logits = _forward(loaded, new, length)
            new = [_agreed(loaded, _choose(logits, temperature, generator))]
            yield new[0]
    finally:
        hook.remove()


def _last_row(module: Any, arguments: Any, out: Tensor) -> Tensor:
    """Only the last token's logits are needed: [t, E] -> [1, E], before the head makes [t, V]."""
    return out[-1:]


def _forward(loaded: Loaded, new: list[int], length: int) -> Tensor:
    """Logits [V] after the last of the new tokens, which end a document of `length`."""
    position_ids = torch.arange(length - len(new), length)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    layout: Any = NewTokens(cu_seqlens=cu_seqlens, token_index=position_ids)
    if length == len(new):
        layout = SequenceLayout.build(cu_seqlens, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    ids = torch.tensor(new, device=loaded.device)
    with forward_only(loaded.model):
        logits: Tensor = loaded.model(ids, position_ids.to(loaded.device), layout=layout)
    return logits[-1]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    odds = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    return int(torch.multinomial(odds, 1, generator=generator))


def _agreed(loaded: Loaded, token: int) -> int:
    """Rank 0's choice: equal logits are not equal bits on unequal devices."""
    group = loaded.mesh.group("world")
    if group.size == 1:
        return token
    return int(comm.broadcast(torch.tensor([token], device=loaded.device), src=0, group=group))
