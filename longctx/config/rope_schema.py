"""Section `model.rope`, in a file of its own for its many keys; import it from `schema`."""

from dataclasses import dataclass, field

from .marks import TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding: the base frequencies and how they are extended.

    Which keys a type reads: `config.rope.METHOD_KEYS`; any other key that is set is an error.
    """

    type: str = "default"
    """default, none, linear, ntk, dynamic, abf, yarn, dynamic_yarn, llama3, longrope, proportional,
    truncated or power."""
    theta: float = 500000.0
    """Base of the frequencies: pair i turns by theta^(-2i/head_dim) radians per token."""
    head_dim: int = 0
    """Dims of a head; 0: `model.head_dim`."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dims that turn. proportional: the fastest pairs of the whole head; other types:
    the first dims, as if the head had no others."""
    none_layers: tuple[int, ...] = ()
    """Layers, counted from 0, without rotary positions (NoPE)."""
    factor: float = 1.0
    """Extension factor target length / original length."""
    original_len: int | None = field(default=None, metadata=TOKENS)
    """Length in tokens that the model was trained on before the extension."""
    target_len: int | None = field(default=None, metadata=TOKENS)
    """Length in tokens after the extension; with `original_len` it gives `factor`."""
    mixed_window: bool = False
    """Documents of at most `original_len` tokens keep the original frequencies (LongRoPE2)."""
    extended_theta: float | None = None
    """abf: the new base; none: the least that the scaling law asks for at `target_len`."""
    attention_factor: float | None = None
    """yarn, dynamic_yarn, longrope: factor on cosine and sine; none: the method's own rule."""
    beta_fast: float = 32.0
    """yarn: pairs with more turns than this over `original_len` stay as they are."""
    beta_slow: float = 1.0
    """yarn: pairs with fewer turns than this over `original_len` are divided by `factor`."""
    truncate: bool = True
    """yarn: the bounds of the ramp are rounded outwards to whole pairs."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim`, weight of ln(factor) in the attention factor's numerator."""
    mscale_all_dim: float | None = None
    """yarn: weight of ln(factor) in the attention factor's denominator."""
    low_freq_factor: float = 1.0
    """llama3: pairs with fewer turns than this over `original_len` are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: pairs with more turns than this over `original_len` stay as they are."""
    short_factor: tuple[float, ...] = ()
    """longrope: divisor of each pair's frequency up to `original_len`."""
    long_factor: tuple[float, ...] = ()
    """longrope: divisor of each pair's frequency in longer documents."""
    low_ratio: float = 16.0
    """truncated: with c the frequency of one turn over `original_len`, slow pairs turn by c / this."""
    zero_ratio: float = 8.0
    """truncated: pairs slower than c / this do not turn."""
    power: float = 0.0
    """power: pair i of n is multiplied by (1 - i/n) to this power."""
