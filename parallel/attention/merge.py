"""Joining attention over disjoint sets of keys.

With lse the logarithm of a row's summed exponentials, two partial results join as
lse = log(exp(a) + exp(b)) and out = out_a + (out_b - out_a) exp(b - lse): the online softmax,
kept in at least float32 so that the error does not grow with the number of hops.
"""

import torch


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Join `part` into `out`, in place.

    Args:
        out: [n, H, D] at least float32; zero where lse is -inf.
        lse: [H, n] at least float32, natural logarithm; -inf for a row without keys.
        part: [n, H, D] attention over keys that `out` has not seen.
        part_lse: [H, n] of `part`.

    Source:
        Ring Attention with Blockwise Transformers, eq. 2; FlashAttention, algorithm 1.
    """
    joined = torch.logaddexp(lse, part_lse)
    # Both -inf: (-inf) - (-inf) is nan, and the weight of nothing is 0.
    weight = (part_lse - joined).exp_().nan_to_num_(nan=0.0)
    out.lerp_(part.to(out.dtype), weight.t().unsqueeze(-1))  # [H, n] -> [n, H, 1]
    lse.copy_(joined)
