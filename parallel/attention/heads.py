"""Which heads a ulysses rank computes (pure).

H query heads, K key/value heads, U ulysses ranks. Query heads are divided as evenly as they go;
a rank receives the distinct key/value heads that its query heads use, so K may be smaller than U
and neither needs to divide by it.
"""

import itertools
from dataclasses import dataclass

from ..errors import ConfigError
from .mask import Mask
from .tiles import Heads


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """Heads of one ulysses rank, numbered over the whole model layer."""

    q: tuple[int, int]
    """Query heads [start, stop)."""
    kv: tuple[int, int]
    """Key and value heads [start, stop) that the query heads use."""

    @property
    def num_q(self) -> int:
        """Number of query heads."""
        return self.q[1] - self.q[0]

    @property
    def num_kv(self) -> int:
        """Number of key and value heads."""
        return self.kv[1] - self.kv[0]


def check_heads(num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """Refuse head counts that no division serves.

    Raises:
        ConfigError: naming the count and a valid choice.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        raise ConfigError(
            f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}; choose one of {divisors}"
        )
    if ulysses > num_heads:
        raise ConfigError(
            f"parallel.ulysses={ulysses} exceeds num_heads={num_heads}; choose at most {num_heads}, "
            "or add parallel.ring"
        )


def split_heads(num_heads: int, num_kv_heads: int, ulysses: int) -> tuple[HeadShare, ...]:
    """Heads of every ulysses rank; shares of query heads differ by at most one."""
    check_heads(num_heads, num_kv_heads, ulysses)
    ratio = num_heads // num_kv_heads
    bounds = [num_heads * u // ulysses for u in range(ulysses + 1)]
    pairs = itertools.pairwise(bounds)
    return tuple(HeadShare(q=(a, b), kv=(a // ratio, (b - 1) // ratio + 1)) for a, b in pairs)


def head_blocks(share: HeadShare, num_heads: int, num_kv_heads: int, mask: Mask) -> tuple[Heads, ...] | None:
    """Blocks of a rank's heads that a kernel can take in one call, numbered within the rank.

    A kernel shares each key head among equally many query heads; a share that starts or ends
    inside a key head's group is cut there. `Mask.group_shift` also cuts between the two halves.

    Returns:
        The blocks, or None when one block holds all heads.
    """
    ratio = num_heads // num_kv_heads
    half = num_heads // 2 if mask.group_shift else num_heads
    blocks: list[Heads] = []
    for kv in range(*share.kv):
        low, high = max(share.q[0], kv * ratio), min(share.q[1], (kv + 1) * ratio)
        for start, stop in ((low, min(high, half)), (max(low, half), high)):
            if start < stop:
                _append(blocks, start - share.q[0], stop - share.q[0], kv - share.kv[0], start >= half)
    return None if len(blocks) == 1 and mask.group_shift is None else tuple(blocks)


def _append(blocks: list[Heads], start: int, stop: int, kv: int, shifted: bool) -> None:
    if blocks and blocks[-1].shifted == shifted and blocks[-1].kv[1] == kv:
        last = blocks[-1]
        if (last.q[1] - last.q[0]) == (last.kv[1] - last.kv[0]) * (stop - start):
            blocks[-1] = Heads(q=(last.q[0], stop), kv=(last.kv[0], kv + 1), shifted=shifted)
            return
    blocks.append(Heads(q=(start, stop), kv=(kv, kv + 1), shifted=shifted))
