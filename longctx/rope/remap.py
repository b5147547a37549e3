"""Longer contexts without training: relative positions are remapped to ones seen in training.

A remap is one to three passes of exact attention over disjoint sets of keys, each with its own
query and key positions, merged by their logarithmic sums. Each pass is an ordinary `attend`, so a
remap runs wherever the attention strategy serves its masks. Distances below are query minus key
position in one document. The logarithmic sums carry no gradient, hence inference only.

Shapes: t = this rank's tokens, H = heads, K = key heads, D = head_dim, P = pairs that turn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.attention import Mask
from parallel.attention.merge import merge_
from parallel.layout import SequenceLayout

from ..config.schema import RemapConfig
from ..errors import ConfigError
from .apply import rotate
from .tables import Attend, Frequencies, RopeTable

Place = Callable[[Tensor], Tensor]
"""Positions [t] int64 -> positions [t] for the rotation, or [t, 1 or heads, P], one for each pair."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Attention over some of the keys, at positions of its own."""

    mask: Mask
    """Which keys; the passes of a remap share none and together cover what it shows."""
    query: Place
    """Positions at which queries are rotated."""
    key: Place
    """Positions at which keys are rotated."""


def _as_is(positions: Tensor) -> Tensor:
    return positions


def string_passes(*, window: int, local: int) -> tuple[Pass, ...]:
    """STRING: distances from `window` on are shifted down, so that the farthest are never rare ones.

    Distance r becomes r where r < window, else r - window + local.

    Args:
        window: S, a third to a half of the training length.
        local: W, distances that stay distinct in front of the shifted ones; 32 or more.

    Source: Why Does the Effective Context Length of LLMs Fall Short? (An et al. 2024), eq. 3.
    """
    near = Pass(mask=Mask(window=window), query=_as_is, key=_as_is)
    far = Pass(mask=Mask(min_distance=window), query=lambda p: p - window + local, key=_as_is)
    return near, far


def self_extend_passes(*, window: int, group: int) -> tuple[Pass, ...]:
    """Self-extend: beyond the window, positions are counted in groups.

    Distance r of positions q and k becomes q // group - k // group + window - window // group.

    Args:
        window: distances that stay as they are.
        group: positions that share one number.

    Source: LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning (Jin et al. 2024), eq. 3.
    """
    near = Pass(mask=Mask(window=window), query=_as_is, key=_as_is)
    far = Pass(
        mask=Mask(min_distance=window),
        query=lambda p: p // group + window - window // group,
        key=lambda p: p // group,
    )
    return near, far


def lm_infinite_passes(*, window: int, sinks: int) -> tuple[Pass, ...]:
    """LM-Infinite: the last tokens, and the first ones at the largest distance seen in training.

    Args:
        window: training length; distances are capped at it.
        sinks: first tokens of a document that stay visible.

    Source: LM-Infinite (Han et al. 2024), sec. 4.
    """
    near = Pass(mask=Mask(window=window), query=_as_is, key=_as_is)
    if sinks == 0:
        return (near,)
    # A window of one token and sinks: of keys at least `window` away only the first tokens are left.
    first = Pass(
        mask=Mask(min_distance=window, window=1, sinks=sinks),
        query=lambda p: torch.full_like(p, window),
        key=torch.zeros_like,
    )
    return near, first


def dpe_passes(*, window: int, scales: Tensor) -> tuple[Pass, ...]:
    """DPE: as self-extend, but every pair of dims, in every head, has its own group.

    Args:
        window: distances that stay as they are.
        scales: int64 [1 or K, P]: positions that share one number; 1 leaves a pair as it is.

    Source: DPE (2025): dimension-wise positional embeddings manipulation, sec. 3.
    """
    near = Pass(mask=Mask(window=window), query=_as_is, key=_as_is)

    def query(positions: Tensor) -> Tensor:
        groups = scales.to(positions.device)
        return positions[:, None, None] // groups + window - window // groups  # [t, 1 or K, P]

    def key(positions: Tensor) -> Tensor:
        return positions[:, None, None] // scales.to(positions.device)

    return near, Pass(mask=Mask(min_distance=window), query=query, key=key)


def group_scales(scales: tuple[int, ...], pairs: int) -> Tensor:
    """Scales of consecutive groups of pairs as int64 [1, P]; the groups are as even as possible.

    Raises:
        ConfigError: more groups than pairs.
    """
    if not 1 <= len(scales) <= pairs:
        raise ConfigError(
            f"eval.remap.scales has {len(scales)} groups, but a head has {pairs} pairs that turn; give 1 to "
            f"{pairs}, fastest pairs first"
        )
    group = torch.arange(pairs) * len(scales) // pairs
    return torch.tensor(scales, dtype=torch.int64)[group][None]


_Maker = Callable[[RemapConfig, int, int], tuple[Pass, ...]]
_MAKERS: Mapping[str, _Maker] = {
    "string": lambda c, window, pairs: string_passes(window=window, local=c.local),
    "self_extend": lambda c, window, pairs: self_extend_passes(window=window, group=c.group),
    "lm_infinite": lambda c, window, pairs: lm_infinite_passes(window=window, sinks=c.sinks),
    "dpe": lambda c, window, pairs: dpe_passes(window=window, scales=group_scales(c.scales, pairs)),
}


def make_passes(config: RemapConfig, *, window: int, pairs: int) -> tuple[Pass, ...]:
    """The passes of a configured remap.

    Args:
        config: not of type off.
        window: distances below this stay as they are, in tokens.
        pairs: pairs of a head that turn.
    """
    return _MAKERS[config.type](config, window, pairs)


@dataclass(frozen=True, kw_only=True)
class Remapped:
    """Stands in for a decoder's `frequencies`: the same rotation at remapped positions."""

    frequencies: Frequencies
    """Of the model."""
    passes: tuple[Pass, ...]
    """Of the remap."""

    def table(
        self,
        position_ids: Tensor,
        rope_id: Tensor | None,
        *,
        dtype: torch.dtype,
        layout: SequenceLayout | None = None,
    ) -> "RemapTables":
        """Tables of every pass; arguments as of `Frequencies.table`."""

        def at(place: Place) -> RopeTable:
            return self.frequencies.table(place(position_ids), rope_id, dtype=dtype, layout=layout)

        return RemapTables([(each.mask, at(each.query), at(each.key)) for each in self.passes])


class RemapTables:
    """One forward's tables; a plain class for the reason that `RopeTable` gives."""

    __slots__ = ("passes",)

    def __init__(self, passes: list[tuple[Mask, RopeTable, RopeTable]]) -> None:
        self.passes = passes

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of all passes, merged: q [t, H, D], k and v [t, K, D] -> [t, H, D].

        Raises:
            ConfigError: a gradient is wanted, or the model's own mask is not plain causal.
        """
        if torch.is_grad_enabled() and q.requires_grad:
            raise ConfigError("a position remap has no gradient; train with eval.remap.type=off")
        if options.pop("mask", Mask()) != Mask():
            raise ConfigError(
                "a position remap replaces the mask, but the model has a sliding window; set "
                "eval.remap.type=off, or model.sliding_window=null"
            )
        merged: tuple[Tensor, Tensor] | None = None
        for mask, queries, keys in self.passes:
            out, lse = attend(
                rotate(q, _for_heads(queries, q)),
                rotate(k, _for_heads(keys, k)),
                v,
                mask=mask,
                return_lse=True,
                **options,
            )
            if merged is None:
                merged = out.to(lse.dtype), lse  # [t, H, D], [H, t]
            else:
                merge_(*merged, out, lse)
        assert merged is not None, "a remap has at least one pass"
        return merged[0].to(q.dtype)


def _for_heads(table: RopeTable, x: Tensor) -> RopeTable:
    """A table for each key head, repeated over the query heads that share it."""
    heads, wanted = table.cos.shape[1], x.shape[1]
    if heads in (1, wanted):
        return table
    if wanted % heads:
        raise ConfigError(
            f"scales for {heads} heads do not fit {wanted}; give one row, or one for each of the model's "
            "num_kv_heads, and set parallel.tp=1"
        )
    cos, sin = (each.repeat_interleave(wanted // heads, dim=1) for each in (table.cos, table.sin))
    return RopeTable(cos, sin)


def dominant_pairs(q: Tensor, k: Tensor, *, count: int) -> Tensor:
    """Pairs that carry most of the logits of each key head, by the product of their norms.

    Args:
        q: [t, H, D] before the rotation, from some calibration text.
        k: [t, K, D] likewise.
        count: pairs to take for each key head; DPE takes 24 of 64.

    Returns:
        bool [K, D/2]; elsewhere set the scale to 1.

    Source: DPE (2025), sec. 3.2.
    """
    norms = [x.unflatten(-1, (2, -1)).norm(dim=-2).mean(0) for x in (q, k)]  # [H, D/2], [K, D/2]
    weight = norms[0].unflatten(0, (k.shape[1], -1)).mean(1) * norms[1]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, weight.topk(count, dim=1).indices, True)


def search_scales(
    score: Callable[[tuple[int, ...]], float],
    *,
    groups: int = 8,
    candidates: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
) -> tuple[int, ...]:
    """Scales for DPE, one group after the other, each by the lowest score with the others fixed.

    Args:
        score: lower is better, such as the loss on needle answers; called groups x candidates times.
        groups: consecutive groups of pairs, fastest first.
        candidates: scales to try; the first is where every group starts.

    Returns:
        One scale for each group; among equal scores the earliest candidate.

    Source: DPE (2025), sec. 3.1: the effective length of each group, found by needle retrieval.
    """
    best = (candidates[0],) * groups
    for group in range(groups):
        tried = [(*best[:group], scale, *best[group + 1 :]) for scale in candidates]
        best = min(tried, key=score)
    return best
