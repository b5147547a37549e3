"""The one place where a strategy's name becomes a function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..comm import all_reduce, gather_rows
from ..errors import ConfigError, UnsupportedError
from ..layout import SequenceLayout
from ..mesh import Mesh, SequenceGroups
from .allgather import GatherRoute
from .backends import check_name, choose
from .check import check_tensors
from .engine import Call, Route, run
from .gather_plan import gather_plan
from .heads import head_blocks, split_heads
from .kernels import Kernel
from .local import local_route
from .mask import Mask
from .plan import Shares
from .ring import RingRoute
from .ring_plan import check_inner, ring_plan
from .ulysses import HeadExchange, gather_heads, scatter_heads

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `make_attention` was asked for beside the strategy's name."""

    kernel: str
    """Kernel name or "auto"."""
    wire_dtype: torch.dtype | None
    """Dtype in which key and value gradients travel; None for at least float32."""
    inner_ring: int | None
    """Ranks of the ring that form one inner ring; None for a single ring."""


RouteMaker = Callable[[Shares, SequenceLayout, SequenceGroups, Options], Route]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to bring queries and keys together."""

    route: RouteMaker
    """How keys travel along the ring axis."""
    ring: bool
    """Whether it serves layout.ring > 1."""
    ulysses: bool
    """Whether it serves layout.ulysses > 1."""
    masks: frozenset[str] = frozenset(
        {"window", "min_distance", "sinks", "anchor", "group_shift", "block_stride"}
    )
    """Mask features that it computes exactly; others are refused."""


def _ring_route(shares: Shares, layout: SequenceLayout, groups: SequenceGroups, options: Options) -> Route:
    if layout.ring == 1:
        return local_route(shares)
    plan = ring_plan(shares, layout.ring_rank, layout.ring, options.inner_ring or layout.ring)
    return RingRoute(plan=plan, group=groups.ring_group, wire_dtype=options.wire_dtype)


def _gather_route(shares: Shares, layout: SequenceLayout, groups: SequenceGroups, options: Options) -> Route:
    if layout.ring == 1:
        return local_route(shares)
    plan = gather_plan(shares, layout.ring_rank)
    return GatherRoute(plan=plan, group=groups.ring_group, wire_dtype=options.wire_dtype)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "local": Strategy(route=_ring_route, ring=False, ulysses=False),
        "ulysses": Strategy(route=_ring_route, ring=False, ulysses=True),
        "ring": Strategy(route=_ring_route, ring=True, ulysses=False),
        "usp": Strategy(route=_ring_route, ring=True, ulysses=True),
        "allgather": Strategy(route=_gather_route, ring=True, ulysses=True),
    }
)
"""What `make_attention` knows; a new strategy is one more entry."""


def strategy(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"attention.strategy={name!r} is unknown; choose one of {list(STRATEGIES)}")
    return STRATEGIES[name]


def check_strategy(name: str, layout: SequenceLayout, mask: Mask) -> None:
    """Refuse what a strategy cannot compute exactly.

    Raises:
        UnsupportedError: naming the degree or the mask, and a strategy that can.
    """
    own = strategy(name)
    for axis, size, served in (("ring", layout.ring, own.ring), ("ulysses", layout.ulysses, own.ulysses)):
        if size > 1 and not served:
            able = [n for n, s in STRATEGIES.items() if getattr(s, axis)]
            raise UnsupportedError(
                f"attention.strategy={name!r} does not serve layout.{axis}={size}; "
                f"set parallel.{axis}=1, or choose one of {able}"
            )
    for feature in mask.features():
        if feature not in own.masks:
            able = [n for n, s in STRATEGIES.items() if feature in s.masks]
            raise UnsupportedError(
                f"attention.strategy={name!r} does not compute mask {feature}={getattr(mask, feature)}; "
                f"choose one of {able}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What every call with the same layout, mask and heads shares."""

    route: Route
    groups: SequenceGroups
    exchange: HeadExchange | None
    order: Tensor | None
    inverse: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Exact attention over a split sequence; made by `make_attention`, called once per layer."""

    name: str
    """Strategy."""
    mesh: Mesh
    """The world; groups are found by each layout's ring and ulysses."""
    options: Options
    """Kernel and wire settings."""
    _kernels: dict[Any, Kernel] = field(default_factory=dict, repr=False)

    def __call__(  # noqa: PLR0913 -- the public seam; all but the tensors are keywords
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: SequenceLayout,
        mask: Mask = Mask(),  # noqa: B008 -- frozen
        softmax_scale: float | None = None,
        return_lse: bool = False,
        return_max_logit: bool = False,
    ) -> Any:
        """Attend to every key that the mask shows, wherever it is.

        Args:
            q: [t, H, D] this rank's queries, in the order of `layout.token_index`.
            k: [t, K, D] this rank's keys; K divides H, and may be smaller than layout.ulysses.
            v: [t, K, D] this rank's values.
            layout: which tokens every rank holds.
            mask: what is seen inside a document.
            softmax_scale: factor on the logits; None for D ** -0.5.
            return_lse: also return the logarithm of the summed exponentials.
            return_max_logit: also return the largest scaled logit per head over all ranks.

        Returns:
            out [t, H, D] in q.dtype, zero where a query sees no key; with `return_lse` also lse
            [H, t], at least float32, natural logarithm, -inf there; with `return_max_logit` also
            [H], equal on all ranks. Neither carries a gradient.

        Raises:
            ConfigError: before any communication, on every rank.
            PeerLost: a rank did not answer within the group's timeout.

        Cost:
            See `traffic`.
        """
        check_strategy(self.name, layout, mask)
        check_tensors(q, k, v, layout, device_type=self.mesh.device_type)
        kernel = self._kernel(q)
        plan = self._plan(layout, mask, q.shape[1], k.shape[1], q.device)
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        if plan.exchange is not None:
            q, k, v = scatter_heads(q, k, v, plan.exchange)
        if plan.order is not None:
            q, k, v = (x.index_select(0, plan.order) for x in (q, k, v))
        call = Call(route=plan.route, kernel=kernel, scale=scale, max_logit=return_max_logit)
        out, lse, largest = run(q, k, v, call)
        if plan.inverse is not None:
            out, lse = out.index_select(0, plan.inverse), lse.index_select(1, plan.inverse)
        if plan.exchange is not None:
            out = gather_heads(out, plan.exchange)
        results = [out]
        if return_lse:
            results.append(_gather_lse(lse, plan.exchange))
        if largest is not None:
            results.append(_reduce_largest(largest, plan))
        return results[0] if len(results) == 1 else tuple(results)

    def _kernel(self, q: Tensor) -> Kernel:
        key = (q.device.type, q.dtype, q.shape[2])
        if key not in self._kernels:
            kernel, _ = choose(self.options.kernel, device=key[0], dtype=key[1], head_dim=key[2])
            self._kernels[key] = kernel
        return self._kernels[key]

    def _plan(
        self, layout: SequenceLayout, mask: Mask, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> _Plan:
        key = (self, mask, num_heads, num_kv_heads, device)
        if key not in layout.plans:
            layout.plans[key] = self._make_plan(layout, mask, num_heads, num_kv_heads, device)
        found: _Plan = layout.plans[key]
        return found

    def _make_plan(
        self, layout: SequenceLayout, mask: Mask, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> _Plan:
        check_inner(layout.ring, self.options.inner_ring or layout.ring)
        groups = self.mesh.sequence(layout.ring, layout.ulysses)
        _check_ranks(layout, groups)
        heads = split_heads(num_heads, num_kv_heads, layout.ulysses)
        shares = Shares.of(
            layout, mask, head_blocks(heads[layout.ulysses_rank], num_heads, num_kv_heads, mask)
        )
        exchange = HeadExchange(
            group=groups.ulysses_group, tokens=tuple(layout.shares(layout.ring_rank)), heads=heads
        )
        order = shares.orders[layout.ring_rank]
        index = None if order is None else torch.from_numpy(order)
        return _Plan(
            route=strategy(self.name).route(shares, layout, groups, self.options),
            groups=groups,
            exchange=None if layout.ulysses == 1 else exchange,
            order=None if index is None else index.to(device),
            inverse=None if index is None else index.argsort().to(device),
        )


def make_attention(
    name: str,
    mesh: Mesh,
    *,
    kernel: str = "auto",
    wire_dtype: torch.dtype | None = None,
    inner_ring: int | None = None,
) -> Attention:
    """Make the function that a decoder calls in every layer.

    Args:
        name: one of `STRATEGIES`.
        mesh: from `build_mesh`, any device type.
        kernel: a kernel's name, or "auto" for the best that can serve each call's tensors.
        wire_dtype: dtype in which key and value gradients travel round the ring; they are added in
            at least float32 whatever it is, which None also takes for the wire.
        inner_ring: ranks of the ring that form an inner ring (a node), for a double ring; None
            for a single ring.

    Returns:
        attend(q, k, v, *, layout, mask, softmax_scale, return_lse, return_max_logit).

    Raises:
        ConfigError: unknown strategy or kernel.
    """
    strategy(name)
    check_name(kernel)
    options = Options(kernel=kernel, wire_dtype=wire_dtype, inner_ring=inner_ring)
    return Attention(name=name, mesh=mesh, options=options)


def _check_ranks(layout: SequenceLayout, groups: SequenceGroups) -> None:
    for axis in ("ring", "ulysses"):
        given, true = getattr(layout, f"{axis}_rank"), getattr(groups, f"{axis}_rank")
        if given != true:
            raise ConfigError(
                f"layout.{axis}_rank={given}, but this process has {axis}_rank={true} in the mesh; "
                f"build the layout with {axis}_rank=mesh.sequence(ring, ulysses).{axis}_rank"
            )


def _gather_lse(lse: Tensor, exchange: HeadExchange | None) -> Tensor:
    if exchange is None:
        return lse
    return gather_heads(lse.t().unsqueeze(-1), exchange).squeeze(-1).t()  # [h, T_r] -> [H, t]


def _reduce_largest(largest: Tensor, plan: _Plan) -> Tensor:
    largest = all_reduce(largest, plan.groups.ring_group, op="max")
    if plan.exchange is None:
        return largest
    return gather_rows(largest, [share.num_q for share in plan.exchange.heads], plan.groups.ulysses_group)
