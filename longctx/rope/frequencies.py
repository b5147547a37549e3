"""Rotary frequencies by method: pure float64 functions in one strict registry.

Every method gives the radians per token of each of the D/2 pairs, and one factor that multiplies
cosine and sine. A method is a function here and its keys in `spec.METHOD_KEYS`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..config.schema import RopeConfig
from .spec import check_rope

Method = Callable[[RopeConfig, int | None], tuple[Tensor, float]]


def rope_parameters(config: RopeConfig, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Frequencies and attention factor of a method.

    Args:
        config: the method and its keys; `head_dim` must be set.
        seq_len: tokens of the sequence, for methods whose frequencies depend on it.

    Returns:
        inv_freq: [D/2] float64 on the CPU, radians per token of each pair, fastest first.
        attention_factor: multiplies cosine and sine.

    Raises:
        ConfigError: the type is unknown, a key does not belong to it, or a value is out of range.
    """
    check_rope(config)
    return METHODS[config.type](config, seq_len)


def _base_frequencies(config: RopeConfig) -> Tensor:
    """theta^(-2i/D). Source: RoFormer (Su et al. 2021), sec. 3.2.2."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    return config.theta**-exponents


def _default(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    return _base_frequencies(config), 1.0


def _linear(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Every position shrinks alike. Source: Position Interpolation (Chen et al. 2023), eq. 4."""
    return _base_frequencies(config) / config.factor, 1.0


def _llama3(config: RopeConfig, seq_len: int | None) -> tuple[Tensor, float]:
    """Slow pairs are divided by the factor, fast ones kept, those between blended.

    Source: Llama 3.1's reference code. With r = original_len / wavelength, the turns a pair makes
    over the original length: divided where r < low_freq_factor, kept where r > high_freq_factor.
    """
    assert config.original_len is not None, "check_rope lets no llama3 pass without original_len"
    inv_freq = _base_frequencies(config)
    turns = config.original_len * inv_freq / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # share of the original frequency
    return inv_freq * (kept + (1 - kept) / config.factor), 1.0


METHODS: Mapping[str, Method] = {"default": _default, "linear": _linear, "llama3": _llama3}
