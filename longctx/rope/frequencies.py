"""Rotary frequencies by method: pure float64 functions in one strict registry.

Every method gives the radians per token of each pair, and one factor that multiplies cosine and
sine. A method is a function here and its keys in `config.rope.METHOD_KEYS`. The pairs are those of
the rotary dims, `rotary_dim(config) / 2` many: D/2 unless `partial_rotary_factor` leaves some out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config.schema import RopeConfig
from .scaling_law import base_for_length
from .spec import check_rope, extension_factor, rotary_dim

Method = Callable[[RopeConfig, int | None], tuple[Tensor, float]]

LENGTH_DEPENDENT = frozenset({"dynamic", "dynamic_yarn", "longrope"})
"""Methods whose frequencies depend on the sequence's length."""


def rope_parameters(config: RopeConfig, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Frequencies and attention factor of a method.

    Args:
        config: the method and its keys; `head_dim` must be set.
        seq_len: tokens of the sequence, for methods whose frequencies depend on it; None: at most
            the original length. With `mixed_window` too: a sequence of at most the original length
            has the original frequencies.

    Returns:
        inv_freq: [D/2] float64 on the CPU, radians per token of each pair, fastest first.
        attention_factor: multiplies cosine and sine.

    Raises:
        ConfigError: the type is unknown, a key does not belong to it, or a value is out of range.
    """
    check_rope(config)
    if config.mixed_window and seq_len is not None and seq_len <= (config.original_len or 0):
        config = original(config)
    return METHODS[config.type](config, seq_len)


def original(config: RopeConfig) -> RopeConfig:
    """The frequencies before any extension."""
    return RopeConfig(
        theta=config.theta,
        head_dim=config.head_dim,
        partial_rotary_factor=config.partial_rotary_factor,
        none_layers=config.none_layers,
        type="proportional" if config.type == "proportional" else "default",
    )


def _base_frequencies(config: RopeConfig, theta: float | None = None) -> Tensor:
    """theta^(-2i/D). Source: RoFormer (Su et al. 2021), sec. 3.2.2."""
    dims = rotary_dim(config)
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device="cpu") / dims
    return (config.theta if theta is None else theta) ** -exponents


def _default(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    return _base_frequencies(config), 1.0


def _none(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Nothing turns. Source: NoPE (Kazemnejad et al. 2023)."""
    return torch.zeros_like(_base_frequencies(config)), 1.0


def _linear(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Every position shrinks alike. Source: Position Interpolation (Chen et al. 2023), eq. 4."""
    return _base_frequencies(config) / extension_factor(config), 1.0


def _ntk(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    return _base_frequencies(config, ntk_theta(config, extension_factor(config))), 1.0


def _dynamic(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """NTK by the sequence's own length; the original frequencies up to the original length.

    Source: dynamic NTK scaling (emozilla 2023), as in transformers.
    """
    factor, length = extension_factor(config), _original_len(config)
    stretch = factor * max(seq_len or 0, length) / length - (factor - 1)
    return _base_frequencies(config, ntk_theta(config, stretch)), 1.0


def ntk_theta(config: RopeConfig, factor: float) -> float:
    """The base that divides the slowest pair's frequency by `factor` and keeps the fastest.

    Source: NTK-aware scaled RoPE (bloc97 2023); YaRN (Peng et al. 2023), eq. 16.
    """
    dims = rotary_dim(config)
    return config.theta * factor ** (dims / (dims - 2)) if dims > 2 else config.theta


def _abf(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    return _base_frequencies(config, abf_theta(config)), 1.0


def abf_theta(config: RopeConfig) -> float:
    """The new base: as given, or the least that reaches `target_len` by the scaling law.

    Source: Effective Long-Context Scaling (Xiong et al. 2023), sec. 4.1; `scaling_law`.
    """
    if config.extended_theta is not None:
        return config.extended_theta
    assert config.target_len is not None, "check_rope lets no abf pass without base or target"
    return base_for_length(
        rotary_dim(config),
        theta=config.theta,
        original_len=_original_len(config),
        target_len=config.target_len,
    )


def _yarn(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """NTK by parts: slow pairs interpolated, fast ones kept, a ramp between them.

    Source: YaRN (Peng et al. 2023), eq. 17 to 22; the ramp is over pair numbers, as in its code.
    """
    factor, inv_freq = extension_factor(config), _base_frequencies(config)
    low, high = _ramp(config)
    pairs = torch.arange(len(inv_freq), dtype=torch.float64, device="cpu")
    divided = ((pairs - low) / (high - low)).clamp(0.0, 1.0)  # share of the divided frequency
    return inv_freq * (1 - divided) + inv_freq / factor * divided, _yarn_attention(config, factor)


def _ramp(config: RopeConfig) -> tuple[float, float]:
    """Pairs at which the ramp begins and ends: beta_fast and beta_slow turns over the original length."""
    dims, length = rotary_dim(config), _original_len(config)

    def pair(turns: float) -> float:
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return low, high + 0.001 if high == low else high


def _yarn_attention(config: RopeConfig, factor: float) -> float:
    """Source: YaRN, eq. 22; the pair of mscales is DeepSeek-V2's."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale is not None and config.mscale_all_dim is not None:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _dynamic_yarn(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """YaRN with the factor of the sequence's own length. Source: YaRN, sec. 3.3."""
    factor = max(1.0, (seq_len or 0) / _original_len(config))
    return _yarn(replace(config, type="yarn", factor=factor), None)


def _llama3(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Slow pairs are divided by the factor, fast ones kept, those between blended.

    Source: Llama 3.1's reference code. With r = original_len / wavelength, the turns a pair makes
    over the original length: divided where r < low_freq_factor, kept where r > high_freq_factor.
    """
    inv_freq = _base_frequencies(config)
    turns = _original_len(config) * inv_freq / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # share of the original frequency
    return inv_freq * (kept + (1 - kept) / extension_factor(config)), 1.0


def _longrope(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Each pair has its own divisor, one set up to the original length and one beyond.

    Source: LongRoPE (Ding et al. 2024), sec. 3; the attention factor is Phi-3's, and as in its code
    holds for both sets.
    """
    length = _original_len(config)
    chosen = config.long_factor if (seq_len or 0) > length else config.short_factor
    divisors = torch.tensor(chosen, dtype=torch.float64, device="cpu")
    if config.attention_factor is not None:
        return _base_frequencies(config) / divisors, config.attention_factor
    factor = extension_factor(config)
    attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1.0 else 1.0
    return _base_frequencies(config) / divisors, attention


def _proportional(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """The fastest pairs of the whole head turn, the others stand. Source: transformers (Gemma)."""
    inv_freq = _base_frequencies(config)
    turning = int(config.partial_rotary_factor * config.head_dim // 2)
    inv_freq[turning:] = 0.0
    return inv_freq / extension_factor(config), 1.0


def _truncated(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Pairs that never finish a turn get one slow frequency, the slowest stand still.

    Source: Giraffe (Pal et al. 2023), sec. 3.3 (truncated basis), with its code's ratios.
    """
    inv_freq, cut = _base_frequencies(config), 2 * math.pi / _original_len(config)
    slow = torch.full_like(inv_freq, cut / config.low_ratio)
    slow[inv_freq < cut / config.zero_ratio] = 0.0
    return torch.where(inv_freq < cut, slow, inv_freq), 1.0


def _power(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Source: Giraffe (Pal et al. 2023), sec. 3.3 (power scaling)."""
    inv_freq = _base_frequencies(config)
    pairs = torch.arange(len(inv_freq), dtype=torch.float64, device="cpu")
    return inv_freq * (1 - pairs / len(inv_freq)) ** config.power, 1.0


def _original_len(config: RopeConfig) -> int:
    assert config.original_len is not None, f"check_rope lets no {config.type} pass without original_len"
    return config.original_len


METHODS: Mapping[str, Method] = {
    "default": _default,
    "none": _none,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "abf": _abf,
    "yarn": _yarn,
    "dynamic_yarn": _dynamic_yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "truncated": _truncated,
    "power": _power,
}
