"""How far a base reaches: the scaling law of RoPE extrapolation. Pure numbers, no torch.

Source: Scaling Laws of RoPE-based Extrapolation (Liu et al. 2023), as restated in LongRoPE2
(Shang et al. 2025), sec. 2: pairs beyond the critical dimension never finish a turn in training.
"""

import math


def critical_dim(head_dim: int, *, theta: float, original_len: int) -> int:
    """The even number of leading dims whose pairs complete a turn within the training length.

    Args:
        head_dim: rotary dims D.
        theta: base of pretraining.
        original_len: training length in tokens.
    """
    turns = original_len / (2 * math.pi)
    if turns <= 1.0:
        return 2
    return min(head_dim, 2 * math.ceil(head_dim / 2 * math.log(turns, theta)))


def longest_context(head_dim: int, *, theta: float, original_len: int, new_theta: float) -> float:
    """Tokens up to which base `new_theta` stays inside the angles seen in training."""
    dims = critical_dim(head_dim, theta=theta, original_len=original_len)
    return float(2 * math.pi * new_theta ** (dims / head_dim))


def base_for_length(head_dim: int, *, theta: float, original_len: int, target_len: int) -> float:
    """The least base that reaches `target_len` tokens; never below `theta`.

    For Llama 2 (head_dim 128, theta 1e4, 4,096 tokens) at 100,000 tokens: about 7e5.
    """
    dims = critical_dim(head_dim, theta=theta, original_len=original_len)
    return max(theta, float((target_len / (2 * math.pi)) ** (head_dim / dims)))
