"""What one rank sends for one attention call (pure).

For even shares this is, in elements sent per rank, with n = T / (ring x ulysses) tokens, U = ulysses,
R = ring, d = H D, k = K D (k_u = max(K, U) D when one divides the other), and rho = wire bytes of a
gradient / bytes of an activation:

    ulysses    each way (U - 1) / U n (2 d + 2 k_u)
    ring       forward (R - 1) n 2 k, backward (R - 1) n 2 k + R n 2 k rho
    usp        ulysses, and ring with k_u for k
    allgather  forward (R - 1) n 2 k, backward (R - 1) n 2 k (1 + rho)

Documents that are whole on a rank, or that ranks further on do not see, lower the terms with R.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..layout import SequenceLayout
from .heads import HeadShare, head_blocks, split_heads
from .mask import Mask
from .plan import GRADIENTS, KEYS, Messages, Shares
from .registry import Options, check_strategy, strategy
from .ring_plan import check_inner
from .ulysses import OUT, QKV


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Calls and bytes of one rank, by the kinds that `comm.Counter` counts."""

    forward_calls: Mapping[str, int]
    """Communications started in the forward pass."""
    forward_sent: Mapping[str, int]
    """Bytes sent to other ranks in the forward pass."""
    backward_calls: Mapping[str, int]
    """Communications started in the backward pass."""
    backward_sent: Mapping[str, int]
    """Bytes sent to other ranks in the backward pass."""

    @property
    def forward_bytes(self) -> int:
        """All bytes sent in the forward pass."""
        return sum(self.forward_sent.values())

    @property
    def backward_bytes(self) -> int:
        """All bytes sent in the backward pass."""
        return sum(self.backward_sent.values())

    @property
    def calls(self) -> int:
        """All communications started."""
        return sum(self.forward_calls.values()) + sum(self.backward_calls.values())


def traffic(  # noqa: PLR0913 -- the public seam; all but the first are keywords
    layout: SequenceLayout,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    strategy: str,
    mask: Mask = Mask(),  # noqa: B008 -- frozen
    wire_itemsize: int | None = None,
    inner_ring: int | None = None,
) -> Traffic:
    """Calls and bytes that the layout's own rank sends for one forward and one backward pass.

    Args:
        layout: the division; `layout.at(...)` gives another rank's view.
        num_heads: query heads of the layer.
        num_kv_heads: key and value heads of the layer.
        head_dim: size of one head.
        itemsize: bytes per element of q, k and v.
        strategy: one of `STRATEGIES`.
        mask: what is seen.
        wire_itemsize: bytes per element of travelling key gradients; None for at least float32.
        inner_ring: as in `make_attention`.

    Returns:
        The counts; a forward pass that also returns lse or the largest logit sends more.

    Raises:
        ConfigError: what `attend` would refuse.
    """
    check_strategy(strategy, layout, mask)
    check_inner(layout.ring, inner_ring or layout.ring)
    heads = split_heads(num_heads, num_kv_heads, layout.ulysses)
    own = heads[layout.ulysses_rank]
    there, back, sums = _exchange_elements(layout, heads, head_dim)
    keys, gradients = _ring_messages(strategy, layout, mask, (own, num_heads, num_kv_heads), inner_ring)
    row = 2 * own.num_kv * head_dim  # elements of one key row and its value row
    wire = max(itemsize, 4) if wire_itemsize is None else wire_itemsize
    calls = int(layout.ulysses > 1)
    return Traffic(
        forward_calls={QKV: calls, KEYS: keys.calls, OUT: calls},
        forward_sent={QKV: there * itemsize, KEYS: keys.rows * row * itemsize, OUT: back * itemsize},
        backward_calls={OUT: calls, KEYS: keys.calls, GRADIENTS: gradients.calls, QKV: calls},
        backward_sent={
            OUT: sums[0] * itemsize,
            KEYS: keys.rows * row * itemsize,
            GRADIENTS: gradients.rows * row * wire,
            QKV: sums[1] * itemsize,
        },
    )


def _exchange_elements(
    layout: SequenceLayout, heads: tuple[HeadShare, ...], head_dim: int
) -> tuple[int, int, tuple[int, int]]:
    """Elements sent to the other ulysses ranks: q, k and v; out; and both ways' gradients."""
    rank, tokens = layout.ulysses_rank, layout.shares(layout.ring_rank)
    mine, others = heads[rank], [u for u in range(layout.ulysses) if u != rank]
    width = [share.num_q + 2 * share.num_kv for share in heads]
    elsewhere = sum(tokens[u] for u in others)
    there = tokens[rank] * sum(width[u] for u in others) * head_dim
    back = elsewhere * mine.num_q * head_dim
    out_gradient = tokens[rank] * sum(heads[u].num_q for u in others) * head_dim
    return there, back, (out_gradient, elsewhere * width[rank] * head_dim)


def _ring_messages(
    name: str, layout: SequenceLayout, mask: Mask, counts: tuple[HeadShare, int, int], inner: int | None
) -> tuple[Messages, Messages]:
    if layout.ring == 1:
        return Messages(0, 0), Messages(0, 0)
    shares = Shares.of(layout, mask, head_blocks(*counts, mask))
    options = Options(kernel="auto", wire_dtype=None, inner_ring=inner)
    keys, gradients = strategy(name).plan(shares, layout, options).messages()
    return keys, gradients
