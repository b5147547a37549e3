"""Cosines and sines of one forward, at this rank's true positions.

Shapes: t = this rank's tokens, D = head_dim.

Angles are products in float64: at 1M tokens a float32 angle is wrong by 2e-2 in a logit, a float64
one by 4e-7. The table is built once per forward and shared by every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class RopeTable:
    """What a rotation needs, for t tokens; not to be changed once made.

    Deliberately neither a tuple nor a dataclass: FSDP2's mixed precision looks for floating tensors
    in those among a block's arguments and casts them to the parameter dtype, and a bfloat16 cosine
    destroys the positions.

    Attributes:
        cos: [t, 1, D/2], at least float32, times the method's attention factor.
        sin: [t, 1, D/2], like `cos`.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


@dataclass(frozen=True, slots=True, kw_only=True)
class Frequencies:
    """The rotary frequencies a model uses; a token's `rope_id` is the row it takes."""

    inv_freq: Tensor
    """[n, D/2] float64 on the CPU, one row per frequency set."""
    attention_factor: Tensor
    """[n] float64 on the CPU: multiplies cosine and sine."""

    @classmethod
    def stack(cls, parameters: Sequence[tuple[Tensor, float]]) -> "Frequencies":
        """Collect results of `rope_parameters`; the order gives the `rope_id`."""
        rows = torch.stack([inv_freq for inv_freq, _ in parameters])
        factors = torch.tensor([factor for _, factor in parameters], dtype=torch.float64, device="cpu")
        return cls(inv_freq=rows, attention_factor=factors)

    def table(self, position_ids: Tensor, rope_id: Tensor | None, *, dtype: torch.dtype) -> RopeTable:
        """Cosines and sines at `position_ids`.

        Args:
            position_ids: [t] int64 or int32, restarting per document.
            rope_id: [t] int64, the frequency set of each token; None: the first. Ignored while there
                is only one.
            dtype: the activations' dtype; the table has it, or float32 if that is wider.

        Returns:
            The table on the device of `position_ids`.

        Raises:
            TypeError: positions are not integers (bfloat16 holds 256 of them exactly).
        """
        if position_ids.is_floating_point():
            raise TypeError(f"position_ids are {position_ids.dtype}; pass int64, which holds every position")
        device = position_ids.device
        inv_freq, factor = self.inv_freq.to(device), self.attention_factor.to(device)[:, None]
        if len(self.inv_freq) > 1 and rope_id is not None:
            inv_freq, factor = inv_freq[rope_id], factor[rope_id]  # [t, D/2], [t, 1]
        else:
            inv_freq, factor = inv_freq[:1], factor[:1]
        angles = position_ids.to(torch.float64)[:, None] * inv_freq  # [t, D/2]
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = ((f(angles) * factor).to(wide)[:, None, :] for f in (torch.cos, torch.sin))
        return RopeTable(cos, sin)
