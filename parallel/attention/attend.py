"""The attention that a decoder calls: checks, exchange of heads, keys along the ring, and back."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..comm import all_reduce, gather_rows, warm_up
from ..errors import ConfigError
from ..layout import SequenceLayout
from ..mesh import Mesh, SequenceGroups
from .backends import Needs, check_name, choose
from .check import check_scale, check_stream_tensor, check_tensors
from .engine import Call, Route, run
from .heads import check_heads, head_blocks, split_heads
from .kept import Kept
from .kernels import Kernel
from .local import local_route
from .mask import Mask
from .plan import Shares
from .registry import Options, check_strategy, strategy
from .ring_plan import check_inner
from .stream import HeadStream
from .ulysses import HeadExchange, gather_heads, scatter_heads

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What every call with the same layout, mask and heads shares."""

    route: Route
    groups: SequenceGroups
    exchange: HeadExchange | None
    order: Tensor | None
    forms: tuple[str, ...]
    grouped: bool
    kept: Kept | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Exact attention over a split sequence; made by `make_attention`, called once per layer."""

    name: str
    """Strategy."""
    mesh: Mesh
    """The world; groups are found by each layout's ring and ulysses."""
    options: Options
    """Kernel and wire settings."""
    _kernels: dict[Any, dict[str, Kernel]] = field(default_factory=dict, repr=False)

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
        check_tensors(q, k, v, layout, device_type=self.mesh.device_type)
        check_scale(softmax_scale)
        plan = self._plan(layout, mask, q.shape[1], k.shape[1])
        self._kernels_for(q, plan)  # refuses before anything is sent
        if plan.exchange is not None:
            q, k, v = scatter_heads(q, k, v, plan.exchange)
        return self._compute(
            q,
            k,
            v,
            plan=plan,
            softmax_scale=softmax_scale,
            return_lse=return_lse,
            return_max_logit=return_max_logit,
        )

    def stream(
        self,
        *,
        layout: SequenceLayout,
        num_heads: int,
        num_kv_heads: int,
        mask: Mask = Mask(),  # noqa: B008 -- frozen
    ) -> HeadStream:
        """Attend to q, k and v that are sent one by one, while the next is being projected.

        Args:
            layout: as in `__call__`.
            num_heads: query heads of the layer.
            num_kv_heads: key and value heads of the layer.
            mask: as in `__call__`.

        Returns:
            A stream with `send(name, tensor)` for "q", "k" and "v", then `attend(...)`.

        Raises:
            ConfigError: as `__call__`.
        """
        check_heads(num_heads, num_kv_heads, layout.ulysses)
        plan = self._plan(layout, mask, num_heads, num_kv_heads)

        def check(name: str, x: Tensor) -> int:
            heads = num_heads if name == "q" else num_kv_heads
            check_stream_tensor(name, x, layout, num_heads=heads, device_type=self.mesh.device_type)
            self._kernels_for(x, plan)
            return heads

        def finish(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            check_scale(options.get("softmax_scale"))
            return self._compute(q, k, v, plan=plan, **options)

        return HeadStream(plan.exchange, check, finish)

    def _compute(  # noqa: PLR0913 -- what both ways in have in common
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: _Plan,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        return_max_logit: bool = False,
    ) -> Any:
        """Attend with this rank's heads and its ring rank's tokens; results for its own tokens."""
        kernels = self._kernels_for(q, plan)
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        if plan.order is not None:
            order = plan.order.to(q.device)
            q, k, v = (x.index_select(0, order) for x in (q, k, v))
        if plan.kept is not None:
            k, v = plan.kept.extend(self, k, v)
        call = Call(route=plan.route, kernels=kernels, scale=scale, max_logit=return_max_logit)
        out, lse, largest = run(q, k, v, call)
        if plan.order is not None:
            inverse = plan.order.argsort().to(q.device)
            out, lse = out.index_select(0, inverse), lse.index_select(1, inverse)
        if plan.exchange is not None:
            out = gather_heads(out, plan.exchange)
        results = [out]
        if return_lse:
            results.append(_gather_lse(lse, plan.exchange))
        if largest is not None:
            results.append(_reduce_largest(largest, plan))
        return results[0] if len(results) == 1 else tuple(results)

    def _kernels_for(self, q: Tensor, plan: _Plan) -> dict[str, Kernel]:
        key = (q.device.type, q.dtype, q.shape[2], plan.grouped, plan.forms)
        if key not in self._kernels:
            device, dtype, head_dim, grouped, _ = key
            self._kernels[key] = {
                form: choose(
                    self.options.kernel,
                    Needs(form=form, device=device, dtype=dtype, head_dim=head_dim, grouped=grouped),
                )[0]
                for form in plan.forms
            }
        return self._kernels[key]

    def _plan(self, layout: SequenceLayout, mask: Mask, num_heads: int, num_kv_heads: int) -> _Plan:
        key = (self.name, self.options, mask, num_heads, num_kv_heads)  # for every layer's attention
        if key not in layout.plans:
            layout.plans[key] = self._make_plan(layout, mask, num_heads, num_kv_heads)
        found: _Plan = layout.plans[key]
        return found

    def _make_plan(self, layout: SequenceLayout, mask: Mask, num_heads: int, num_kv_heads: int) -> _Plan:
        check_strategy(self.name, layout, mask)
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
        return _Plan(
            route=self._route(shares, layout, groups),
            groups=groups,
            exchange=None if layout.ulysses == 1 else exchange,
            order=None if order is None else torch.from_numpy(order),
            forms=mask.forms,
            grouped=num_heads != num_kv_heads,
            kept=layout.kept,
        )

    def _route(self, shares: Shares, layout: SequenceLayout, groups: SequenceGroups) -> Route:
        if layout.ring == 1:
            return local_route(shares)
        warm_up(groups.ring_group)
        own = strategy(self.name)
        return own.route(own.plan(shares, layout, self.options), groups.ring_group, self.options)


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
