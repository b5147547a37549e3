"""One kernel in one process against the dense mask, whatever the machine would choose."""

import dense
import torch

from parallel.attention.engine import Call, run
from parallel.attention.heads import head_blocks, split_heads
from parallel.attention.local import local_route
from parallel.attention.plan import Shares
from parallel.layout import SequenceLayout

LENGTHS = (1, 30, 0, 17, 3)


def errors(kernel, mask, *, heads=(4, 2), head_dim=8, lengths=LENGTHS, where=(torch.float64, "cpu")):
    """Errors of out, lse, dq, dk and dv against float64; `where` is (dtype, device)."""
    dtype, device = where
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = SequenceLayout.build(offsets, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    whole = [x.to(device) for x in dense.inputs(offsets[-1], *heads, head_dim, dtype)]
    local = [x.clone().requires_grad_() for x in whole[:3]]
    reference = [x.double().requires_grad_() for x in whole[:3]]
    seen = dense.visible(offsets, mask, heads[0]).to(device)
    expected, expected_lse, _ = dense.attention(*reference, seen, head_dim**-0.5)
    expected.backward(whole[3].double())
    (share,) = split_heads(*heads, 1)
    shares = Shares.of(layout, mask, head_blocks(share, *heads, mask))
    call = Call(
        route=local_route(shares),
        kernels=dict.fromkeys(("full", "causal", "band"), kernel),
        scale=head_dim**-0.5,
    )
    rows = torch.arange(offsets[-1]) if shares.orders[0] is None else torch.from_numpy(shares.orders[0])
    out, lse, _ = run(*(x[rows.to(device)] for x in local), call)
    back = rows.argsort().to(device)
    out, lse = out[back], lse[:, back]
    out.backward(whole[3])
    pairs = [(out, expected), (lse, expected_lse)]
    pairs += [(a.grad, b.grad) for a, b in zip(local, reference, strict=True)]
    return [dense.error(a.detach(), b.detach()) for a, b in pairs]
