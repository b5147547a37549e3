"""Section `eval`, in a file of its own; import it from `schema`."""

from dataclasses import dataclass, field
from typing import Literal

from .marks import TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class RemapConfig:
    """A remap of relative positions at evaluation, without training."""

    type: Literal["off", "string", "self_extend", "dpe", "lm_infinite"] = "off"
    """off: positions as they are."""
    window: int = field(default=0, metadata=TOKENS)
    """Distances below this stay as they are; at most the training length. 0: half of it."""
    local: int = field(default=128, metadata=TOKENS)
    """string: distances kept apart in front of the shifted ones."""
    group: int = 8
    """self_extend: positions that share one number beyond the window."""
    sinks: int = field(default=16, metadata=TOKENS)
    """lm_infinite: first tokens of a document that stay visible."""
    scales: tuple[int, ...] = ()
    """dpe: positions that share one number, for consecutive groups of pairs, fastest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Where in the context a model works: `longctx eval`, and during training."""

    every_tokens: int = field(default=0, metadata=TOKENS)
    """Trained tokens between evaluations during training; 0: none."""
    budget_s: float = 60.0
    """Seconds for one evaluation during training; work that does not fit is left out and named."""
    tasks: tuple[str, ...] = ("loss", "original", "passkey", "niah_single")
    """loss (by position), original (held-out loss at the length before the extension), and grids of depth
    and length: passkey, niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, fwe."""
    lengths: tuple[int, ...] = field(default=(), metadata=TOKENS)
    """Context lengths in tokens; none: `data.seq_len`."""
    documents: int = 4
    """Documents of each length for the loss by position."""
    buckets: int = 8
    """Buckets of positions, of equal width."""
    window: int = field(default=0, metadata=TOKENS)
    """Tokens that the model sees at once in the loss by position; 0: the whole length."""
    stride: int = field(default=256, metadata=TOKENS)
    """With a window: tokens by which it slides; only these are scored."""
    depths: int = 5
    """Depths of the needle grid, from the start to the end of the context."""
    trials: int = 2
    """Prompts for each cell of the grid and for each generator and length."""
    seed: int = 0
    """Seed of the prompts."""
    remap: RemapConfig = RemapConfig()
    """Remap of relative positions."""
