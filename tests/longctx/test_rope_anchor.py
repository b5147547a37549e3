"""AnchorAttention with its positions: the dense mask, forward and gradients, in every strategy.

The anchor is the row's first token; positions run over the row without restarting.
"""

import dense
import pytest
import torch
from ranks import run_ranks

from longctx.rope import RopeConfig
from longctx.rope.tables import Frequencies
from parallel.attention import Mask, make_attention
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh

ENDS = (0, 1, 30, 37, 90)
TOTAL, HEADS, KV_HEADS, DIM = ENDS[-1], 4, 2, 16
ANCHOR = Mask(anchor=True)
FREQUENCIES = Frequencies.of(RopeConfig(head_dim=DIM, theta=100.0))


def attended(attend, tensors, index, **options):
    """Output and gradients of these tokens."""
    q, k, v, grad = (x[index].clone().requires_grad_(i < 3) for i, x in enumerate(tensors))
    table = FREQUENCIES.table(index, None, dtype=q.dtype)
    out = table.attend(attend, q, k, v, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def anchored(rank, size, degrees, strategy, dtype):
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")
    ring, ulysses = degrees.get("ring", 1), degrees.get("ulysses", 1)
    groups = mesh.sequence(ring, ulysses)
    layout = SequenceLayout.build(
        ENDS, ring=ring, ulysses=ulysses, ring_rank=groups.ring_rank, ulysses_rank=groups.ulysses_rank
    )
    tensors = dense.inputs(TOTAL, HEADS, KV_HEADS, DIM, dtype)
    found = attended(make_attention(strategy, mesh), tensors, layout.token_index, layout=layout, mask=ANCHOR)
    mesh.close()
    return layout.token_index, found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("degrees", "strategy"),
    [({"ulysses": 2}, "ulysses"), ({"ring": 2}, "ring"), ({"ring": 2, "ulysses": 2}, "usp")],
)
def test_anchor_equals_dense(degrees, strategy, dtype, tolerance):
    tensors = dense.inputs(TOTAL, HEADS, KV_HEADS, DIM, torch.float64)
    seen = dense.visible(list(ENDS), ANCHOR, HEADS)
    assert seen[0, :, 0].all() and not seen[0, 50, 29]

    def reference(q, k, v):
        return dense.attention(q, k, v, seen, DIM**-0.5)[0]

    expected = attended(reference, tensors, torch.arange(TOTAL))
    size = degrees.get("ring", 1) * degrees.get("ulysses", 1)
    for index, found in run_ranks(anchored, size, degrees, strategy, dtype):
        for name, ours, whole in zip(("out", "q", "k", "v"), found, expected, strict=True):
            assert (ours.double() - whole[index]).abs().max() <= tolerance * whole.abs().max(), name
