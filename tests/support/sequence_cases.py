"""Random cases of attention over a split sequence, and how a rank checks one against the dense mask."""

from dataclasses import dataclass, field

import dense
import torch
from hypothesis import strategies as st

from parallel.attention import Mask, make_attention
from parallel.layout import KINDS, SequenceLayout

MASKS = (
    {},
    {"causal": False},
    {"window": 5},
    {"window": 1},
    {"window": 300},
    {"window": 5, "sinks": 2},
    {"window": 4, "causal": False},
    {"window": 4, "sinks": 3, "causal": False},
    {"min_distance": 3},
    {"min_distance": 2, "window": 6},
    {"min_distance": 6, "window": 6, "sinks": 3},
    {"anchor": True},
    {"anchor": True, "window": 4},
    {"anchor": True, "causal": False},
    {"group_shift": 6},
    {"group_shift": 7, "causal": False},
    {"block_stride": (3, 2)},
    {"block_stride": (4, 3), "causal": False},
)
"""Every feature of a mask, and the pairs that combine."""

HEADS = ((4, 4), (8, 2), (8, 1), (12, 4), (9, 3), (7, 7), (6, 2))


@dataclass(frozen=True)
class Case:
    """One attention call over all ranks."""

    strategy: str
    ring: int
    ulysses: int
    heads: tuple
    head_dim: int
    lengths: tuple
    kind: str
    mask: dict
    options: dict = field(default_factory=dict)

    @property
    def cu_seqlens(self):
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()]


@st.composite
def cases(draw, ranks, masks=MASKS):
    """A case for `ranks` processes: any split, heads, lengths (also 0 and 1), layout and mask."""
    ring = draw(st.sampled_from([r for r in range(1, ranks + 1) if ranks % r == 0]))
    ulysses = ranks // ring
    names = ["usp", "allgather"]
    names += ["ring"] if ulysses == 1 else []
    names += ["ulysses"] if ring == 1 else []
    names += ["local"] if ranks == 1 else []
    strategy = draw(st.sampled_from(names))
    inner = draw(st.sampled_from([None, *(d for d in range(1, ring + 1) if ring % d == 0)]))
    return Case(
        strategy=strategy,
        ring=ring,
        ulysses=ulysses,
        heads=draw(st.sampled_from([h for h in HEADS if h[0] >= ulysses])),
        head_dim=draw(st.sampled_from((1, 4, 16))),
        lengths=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))),
        kind=draw(st.sampled_from(KINDS)),
        mask=draw(st.sampled_from(masks)),
        options={"inner_ring": inner} if strategy in ("ring", "usp") else {},
    )


def layout_of(case, mesh):
    """This rank's layout."""
    groups = mesh.sequence(case.ring, case.ulysses)
    return SequenceLayout.build(
        case.cu_seqlens,
        ring=case.ring,
        ulysses=case.ulysses,
        ring_rank=groups.ring_rank,
        ulysses_rank=groups.ulysses_rank,
        kind=case.kind,
    )


def errors(case, mesh, dtype=torch.float64, **options):
    """Errors of out, lse, largest logit, dq, dk and dv on this rank."""
    mask = Mask(**case.mask)
    whole = dense.inputs(case.cu_seqlens[-1], *case.heads, case.head_dim, dtype)
    scale = case.head_dim**-0.5
    reference = [x.double().clone().requires_grad_() for x in whole[:3]]
    seen = dense.visible(case.cu_seqlens, mask, case.heads[0])
    out, lse, largest = dense.attention(*reference, seen, scale)
    out.backward(whole[3].double())
    layout = layout_of(case, mesh)
    index = layout.token_index
    local = [x[index].to(mesh.device_type).requires_grad_() for x in whole[:3]]
    attend = make_attention(case.strategy, mesh, **case.options, **options)
    results = attend(*local, layout=layout, mask=mask, return_lse=True, return_max_logit=True)
    results[0].backward(whole[3][index].to(mesh.device_type))
    expected = [out[index], lse[:, index], largest, *(x.grad[index] for x in reference)]
    found = [*results, *(x.grad for x in local)]
    return [dense.error(a.detach().cpu(), b.detach()) for a, b in zip(found, expected, strict=True)]
