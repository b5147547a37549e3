"""Dropout whose mask depends on the token alone: the same in every layout, and again when recomputed.

A generator's stream depends on who draws how often: on the rank, the shard, the order of microbatches
and on recomputation. Here each number is a hash of (seed, step, place, token, channel).

Shapes: n = rows of one rank, t = tokens of the data rank, E = channels.

Source: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al. 2011), the idea; SplitMix64 (Steele et
al. 2014), the hash.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

_RANGE = 1 << 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenNoise:
    """What the rows at hand drop."""

    row: Tensor
    """int64 [n]: hash of what a row is: seed, step, layer, token; rows of padding hold anything."""
    rate: float
    """Share of the elements that become zero, from 0 up to 1; 0: nothing happens."""

    @classmethod
    def none(cls) -> Self:
        """Noise that drops nothing."""
        return cls(row=torch.zeros(0, dtype=torch.int64), rate=0.0)

    @classmethod
    def of(cls, token_id: Tensor, *, seed: int, step: int, rate: float) -> Self:
        """Noise of one step; `token_id` int64 [n] names tokens uniquely within it."""
        return cls(row=_mix(token_id ^ _mixed(_mixed(seed) ^ step)), rate=rate)

    def at(self, layer: int) -> Self:
        """The noise of a layer."""
        return replace(self, row=_mix(self.row ^ _mixed(layer))) if self.rate else self

    def rows(self, first: int, count: int) -> Self:
        """The rows [first, first + count), padded where there are fewer."""
        part = self.row[first : first + count]
        return replace(self, row=torch.cat((part, part.new_zeros(count - len(part))))) if self.rate else self

    def drop(self, x: Tensor, place: int) -> Tensor:
        """Zero a share of x and scale the rest up, so that its expectation stays: [n, E] -> [n, E].

        Args:
            x: one row for each of `row`.
            place: 0 or 1, where in the layer.

        Cost: n E hashes in int64; saves one byte an element.
        """
        if self.rate == 0.0:
            return x
        counter = 2 * torch.arange(x.shape[-1], device=x.device) + place  # [E]
        drawn = _mix(self.row[:, None] + counter * _GOLDEN) & (_RANGE - 1)  # [n, E]
        return x * (drawn >= round(self.rate * _RANGE)) * (1.0 / (1.0 - self.rate))


class TokenDropout(nn.Module):
    """`TokenNoise.drop` as a module of its own, so that compilation can leave it out of a graph.

    torch 2.13's compiler fails on the hash.
    """

    def forward(self, x: Tensor, noise: TokenNoise, place: int) -> Tensor:
        """[n, E] -> [n, E]."""
        return noise.drop(x, place)


def _signed(value: int) -> int:
    """The number with the same 64 bits in two's complement, as torch's int64 has them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer; int64 products wrap around, and shifts fill with zeros."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> of int64 copies the sign


def _mixed(value: int) -> int:
    return int(_mix(torch.tensor(_signed(value + _GOLDEN))))
