"""Attention that remembers: a prompt's keys and values are kept, later tokens attend to all of them.

Shapes: t = new tokens, T = tokens so far, H = query heads, K = key and value heads, D = head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.attention import Mask
from parallel.errors import UnsupportedError
from parallel.layout import SequenceLayout

from ..rope.tables import Attend


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """The layout of tokens that continue a document."""

    cu_seqlens: Tensor
    """[2] int32: the document, from 0 to T."""
    token_index: Tensor
    """[t] int64: where the new tokens are in it."""


class CachedAttend:
    """`attend` of one document that grows; the layers of a model call it in turn."""

    def __init__(self, prefill: Attend, num_layers: int) -> None:
        self._prefill = prefill
        self._num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Forget the document."""
        self._layers: list[_Memory] = [_Memory() for _ in range(self._num_layers)]
        self._next = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout | NewTokens, mask: Mask
    ) -> Tensor:
        """Q [t, H, D], k and v [t, K, D] of the new tokens -> [t, H, D]."""
        memory = self._layers[self._next]
        self._next = (self._next + 1) % self._num_layers
        first = memory.length == 0
        memory.append(k, v)
        if first:
            out: Tensor = self._prefill(q, k, v, layout=layout, mask=mask)
            return out
        if mask != Mask(window=mask.window):
            raise UnsupportedError(f"sampling does not compute mask {mask}; only causal with a window")
        return memory.attend(q, mask.window)


class _Memory:
    """Keys and values of one layer; room doubles."""

    def __init__(self) -> None:
        self.length = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep [t, K, D] of each."""
        need = self.length + len(k)
        if self._room is None or need > len(self._room[0]):
            grown = tuple(each.new_empty(max(256, 2 * need), *each.shape[1:]) for each in (k, v))
            for new, old in zip(grown, self._room or (), strict=False):
                new[: self.length] = old[: self.length]
            self._room = grown[0], grown[1]
        for room, each in zip(self._room, (k, v), strict=True):
            room[self.length : need] = each
        self.length = need

    def attend(self, q: Tensor, window: int | None) -> Tensor:
        """The last t tokens' queries [t, H, D] over everything up to them."""
        assert self._room is not None
        count = len(q)
        keep = self.length if window is None else min(self.length, window + count - 1)
        k, v = (room[self.length - keep : self.length] for room in self._room)  # [keep, K, D]
        distance = torch.arange(keep - count, keep, device=q.device)[:, None] - torch.arange(
            keep, device=q.device
        )
        seen = (distance >= 0) & (distance < (window or self.length))  # [t, keep]
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))  # [1, H or K, t or keep, D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1)
