"""Cosines and sines of one forward, at this rank's true positions.

Shapes: t = this rank's tokens, D = head_dim, P = pairs that turn (D/2, or fewer with partial rotary).

Angles are products in float64: at 1M tokens a float32 angle is wrong by 2e-2 in a logit, a float64
one by 4e-7. The table is built once per forward and shared by every layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.layout import SequenceLayout

from ..config.schema import RopeConfig
from .apply import rotate
from .frequencies import LENGTH_DEPENDENT, original, rope_parameters

Attend = Callable[..., Any]
"""attend(q [t, H, D], k [t, K, D], v [t, K, D], *, layout, mask) -> [t, H, D]."""


class Positions(Protocol):
    """How queries and keys learn where they are; made once per forward, handed to every layer."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention with positions: q [t, H, D], k and v [t, K, D] -> [t, H, D]."""


class RopeTable:
    """What a rotation needs, for t tokens; not to be changed once made.

    Deliberately neither a tuple nor a dataclass: FSDP2's mixed precision looks for floating tensors
    in those among a block's arguments and casts them to the parameter dtype, and a bfloat16 cosine
    destroys the positions.

    Attributes:
        cos: [t, 1, P], at least float32, times the method's attention factor; a position remap may
            have one row for each head.
        sin: like `cos`.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of turned queries and keys: q [t, H, D], k and v [t, K, D] -> [t, H, D]."""
        out: Tensor = attend(rotate(q, self), rotate(k, self), v, **options)
        return out


class NoPositions:
    """What a layer without rotary positions gets in the place of a table."""

    __slots__ = ()

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention as it is: q [t, H, D], k and v [t, K, D] -> [t, H, D]."""
        out: Tensor = attend(q, k, v, **options)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Frequencies:
    """The rotary frequencies a model uses; a token's `rope_id` is the row it takes."""

    inv_freq: Tensor
    """[n, P] float64 on the CPU, one row per frequency set."""
    attention_factor: Tensor
    """[n] float64 on the CPU: multiplies cosine and sine."""
    by_length: tuple[RopeConfig, ...] = ()
    """The n methods, if one of them depends on the document's length."""
    original_len: int | None = None
    """Mixed windows: longer documents take set 1, whatever their `rope_id`."""

    @classmethod
    def of(cls, config: RopeConfig) -> "Frequencies":
        """The sets of a model: one, or with `mixed_window` the original (0) and the extended (1)."""
        if config.mixed_window:
            configs = (original(config), replace(config, mixed_window=False))
            return replace(cls.stack([rope_parameters(c) for c in configs]), original_len=config.original_len)
        rows = cls.stack([rope_parameters(config)])
        return replace(rows, by_length=(config,)) if config.type in LENGTH_DEPENDENT else rows

    @classmethod
    def stack(cls, parameters: Sequence[tuple[Tensor, float]]) -> "Frequencies":
        """Collect results of `rope_parameters`; the order gives the `rope_id`."""
        rows = torch.stack([inv_freq for inv_freq, _ in parameters])
        factors = torch.tensor([factor for _, factor in parameters], dtype=torch.float64, device="cpu")
        return cls(inv_freq=rows, attention_factor=factors)

    def table(
        self,
        position_ids: Tensor,
        rope_id: Tensor | None,
        *,
        dtype: torch.dtype,
        layout: SequenceLayout | None = None,
    ) -> RopeTable:
        """Cosines and sines at `position_ids`.

        Args:
            position_ids: [t] int64 or int32, restarting per document; or [t, h, P], for each
                pair of each of h heads (h may be 1).
            rope_id: [t] int64, the frequency set of each token; None: the first. Ignored while there
                is only one. With mixed windows, tokens of long documents take the second anyway.
            dtype: the activations' dtype; the table has it, or float32 if that is wider.
            layout: tells each document's length where the frequencies depend on it; None: no
                document is longer than the original length.

        Returns:
            The table on the device of `position_ids`.

        Raises:
            TypeError: positions are not integers (bfloat16 holds 256 of them exactly).
        """
        if position_ids.is_floating_point():
            raise TypeError(f"position_ids are {position_ids.dtype}; pass int64, which holds every position")
        rows, index = self._rows(rope_id, layout)
        device = position_ids.device
        inv_freq, factor = rows.inv_freq.to(device)[:, None], rows.attention_factor.to(device)[:, None, None]
        if index is not None:
            index = index.to(device)
            inv_freq, factor = inv_freq[index], factor[index]  # [t, 1, P], [t, 1, 1]
        else:
            inv_freq, factor = inv_freq[:1], factor[:1]
        positions = position_ids if position_ids.ndim == 3 else position_ids[:, None, None]
        angles = positions.to(torch.float64) * inv_freq  # [t, 1, P]
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = ((f(angles) * factor).to(wide) for f in (torch.cos, torch.sin))
        return RopeTable(cos, sin)

    def _rows(
        self, rope_id: Tensor | None, layout: SequenceLayout | None
    ) -> tuple["Frequencies", Tensor | None]:
        """Frequency rows and the row of each token [t]; None: the first row for all."""
        if self.by_length and layout is not None:
            return _rows_by_length(self.by_length, token_lengths(layout), rope_id) or (self, None)
        if len(self.inv_freq) == 1:
            return self, None
        if layout is not None and self.original_len is not None:
            long = (token_lengths(layout) > self.original_len).to(torch.int64)
            rope_id = long if rope_id is None else torch.maximum(rope_id, long.to(rope_id.device))
        return self, rope_id


def _rows_by_length(
    configs: Sequence[RopeConfig], token_lengths: Tensor, rope_id: Tensor | None
) -> tuple[Frequencies, Tensor] | None:
    """One row for each method and document length, and the row of each token; None without tokens."""
    lengths, index = torch.unique(token_lengths, return_inverse=True)  # [u], [t]
    if not len(lengths):
        return None
    rows = Frequencies.stack([rope_parameters(each, n) for each in configs for n in lengths.tolist()])
    if rope_id is not None and len(configs) > 1:
        index = index.to(rope_id.device) + rope_id * len(lengths)
    return rows, index


def token_lengths(layout: SequenceLayout) -> Tensor:
    """Tokens of the document of each of this rank's tokens: int64 [t] on the CPU."""
    ends = torch.as_tensor(layout.cu_seqlens, dtype=torch.int64, device="cpu")
    document = torch.searchsorted(ends, layout.token_index, right=True) - 1
    return ends.diff()[document]
