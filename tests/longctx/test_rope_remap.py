"""Remaps equal attention with a dense matrix of remapped positions, alone and over several ranks."""

import dense
import pytest
import torch
from ranks import run_ranks

from longctx.config.schema import ModelConfig, RemapConfig
from longctx.errors import ConfigError
from longctx.model.decoder import Decoder
from longctx.rope import RopeConfig
from longctx.rope.remap import (
    Remapped,
    dominant_pairs,
    dpe_passes,
    group_scales,
    lm_infinite_passes,
    make_passes,
    search_scales,
    self_extend_passes,
    string_passes,
)
from longctx.rope.tables import Frequencies
from parallel.attention import Mask, make_attention
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh

HEADS, KV_HEADS, DIM, PAIRS = 4, 2, 16, 8
LENGTHS = (70, 5, 41)
FREQUENCIES = Frequencies.of(RopeConfig(type="yarn", theta=100.0, head_dim=DIM, factor=4.0, original_len=16))
SCALES = (1, 2, 8, 4)
ROW = group_scales(SCALES, PAIRS)
PER_HEAD = torch.tensor([[1, 1, 2, 3, 4, 5, 6, 7], [3] * 8])


def grouped(scales):
    """[K, P]: distance of query p and key s at every pair of every key head."""
    return lambda p, s: torch.where(
        (p - s < 12)[..., None, None], (p - s)[..., None, None],
        p[..., None, None] // scales - s[..., None, None] // scales + 12 - 12 // scales,
    )  # fmt: skip


def plain(function):
    return lambda p, s: function(p - s)[..., None, None].expand(*p.shape, 1, PAIRS)


# name -> passes, distance [T, T, 1 or K, P] by definition, keys beyond the causal ones that are hidden
CASES = {
    "string": (string_passes(window=12, local=5), plain(lambda r: torch.where(r < 12, r, r - 7)), None),
    "self_extend": (self_extend_passes(window=12, group=5), grouped(torch.full((1, PAIRS), 5)), None),
    "lm_infinite": (
        lm_infinite_passes(window=12, sinks=3), plain(lambda r: r.clamp(max=12)),
        lambda p, s: (p - s >= 12) & (s >= 3),
    ),
    "lm_infinite without sinks": (
        lm_infinite_passes(window=12, sinks=0), plain(lambda r: r), lambda p, s: p - s >= 12,
    ),
    "dpe": (dpe_passes(window=12, scales=ROW), grouped(ROW), None),
    "dpe by head": (dpe_passes(window=12, scales=PER_HEAD), grouped(PER_HEAD), None),
}  # fmt: skip


def by_definition(name, q, k, v):
    """Logit of every pair of tokens rotated by its own distance, in one dense matrix."""
    _, distance, hidden = CASES[name]
    positions = dense.positions(LENGTHS)
    p, s = torch.broadcast_tensors(positions[:, None], positions[None])
    angles = distance(p, s).double() * FREQUENCIES.inv_freq[0]  # [T, T, 1 or K, P]
    angles = angles.expand(*p.shape, KV_HEADS, PAIRS).repeat_interleave(HEADS // KV_HEADS, 2)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    (q1, q2), (k1, k2) = q.unflatten(-1, (2, -1)).unbind(-2), k.unflatten(-1, (2, -1)).unbind(-2)
    even = torch.einsum("qhp,khp,qkhp->hqk", q1, k1, angles.cos()) + torch.einsum(
        "qhp,khp,qkhp->hqk", q2, k2, angles.cos()
    )
    odd = torch.einsum("qhp,khp,qkhp->hqk", q1, k2, angles.sin()) - torch.einsum(
        "qhp,khp,qkhp->hqk", q2, k1, angles.sin()
    )
    logits = (even + odd) * FREQUENCIES.attention_factor[0] ** 2 * DIM**-0.5
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (document[:, None] == document) & (p >= s)
    if hidden is not None:
        seen &= ~hidden(p, s)
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def remapped(rank, size, name, degrees, strategy):
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")
    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    groups = mesh.sequence(degrees.get("ring", 1), degrees.get("ulysses", 1))
    layout = SequenceLayout.build(
        ends, ring=degrees.get("ring", 1), ulysses=degrees.get("ulysses", 1),
        ring_rank=groups.ring_rank, ulysses_rank=groups.ulysses_rank,
    )  # fmt: skip
    q, k, v, _ = (x[layout.token_index] for x in dense.inputs(ends[-1], HEADS, KV_HEADS, DIM, torch.float64))
    positions = dense.positions(LENGTHS)[layout.token_index]
    tables = Remapped(frequencies=FREQUENCIES, passes=CASES[name][0])
    table = tables.table(positions, None, dtype=torch.float64, layout=layout)
    out = table.attend(make_attention(strategy, mesh), q, k, v, layout=layout)
    mesh.close()
    return layout.token_index, out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("degrees", "strategy"),
    [({}, "local"), ({"ulysses": 2}, "ulysses"), ({"ring": 3}, "ring"), ({"ring": 2, "ulysses": 2}, "usp")],
)
def test_remap_equals_a_dense_position_matrix(name, degrees, strategy):
    q, k, v, _ = dense.inputs(sum(LENGTHS), HEADS, KV_HEADS, DIM, torch.float64)
    expected = by_definition(name, q, k, v)
    size = degrees.get("ring", 1) * degrees.get("ulysses", 1)
    found = torch.full_like(expected, torch.nan)
    for index, out in run_ranks(remapped, size, name, degrees, strategy):
        found[index] = out
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_short_documents_are_left_alone():
    """Nothing changes for documents within the window."""
    config = ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, head_dim=8, vocab_size=64)
    model = Decoder(config, dense_lse).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        ids, layout = torch.arange(30), dense.packed((12, 9, 9))
        plain = model(ids, dense.positions((12, 9, 9)), layout=layout)
        for kind in ("string", "self_extend", "dpe", "lm_infinite"):
            passes = make_passes(RemapConfig(type=kind, scales=(4,), local=4), window=12, pairs=4)
            model.frequencies = Remapped(frequencies=Frequencies.of(RopeConfig(head_dim=8)), passes=passes)
            torch.testing.assert_close(model(ids, dense.positions((12, 9, 9)), layout=layout), plain)


def dense_lse(q, k, v, *, layout, mask, return_lse=False):
    seen = dense.visible(layout.cu_seqlens.tolist(), mask, q.shape[1])
    return dense.attention(q, k, v, seen, q.shape[-1] ** -0.5)[: 2 if return_lse else 1][
        slice(None) if return_lse else 0
    ]


def test_gradients_and_other_masks_are_refused():
    tables = Remapped(frequencies=FREQUENCIES, passes=CASES["string"][0])
    table = tables.table(torch.arange(4), None, dtype=torch.float64)
    q, k, v, _ = dense.inputs(4, HEADS, KV_HEADS, DIM, torch.float64)
    with pytest.raises(ConfigError, match="no gradient; train with eval"):
        table.attend(dense_lse, q.requires_grad_(), k, v, layout=dense.packed((4,)))
    with pytest.raises(ConfigError, match="model has a sliding window"):
        table.attend(dense_lse, q.detach(), k, v, layout=dense.packed((4,)), mask=Mask(window=3))


def test_scales_are_searched_group_by_group():
    best, calls = (1, 4, 2), []

    def score(scales):
        calls.append(scales)
        return sum(abs(a - b) for a, b in zip(scales, best, strict=True))

    assert search_scales(score, groups=3, candidates=(1, 2, 4)) == best
    assert len(calls) == 9
    assert search_scales(lambda scales: 0.0, groups=4) == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="9 groups, but a head has 8 pairs"):
        group_scales((1,) * 9, 8)


def test_dominant_pairs_are_those_with_the_largest_norms():
    q, k = torch.ones(5, 4, 8), torch.ones(5, 2, 8)
    k[:, 0, 1] = k[:, 0, 6] = 9.0  # pairs 1 and 2 of key head 0
    q[:, 2:, 4] = 9.0  # pair 0, in the query heads of key head 1
    k[:, 1, 3] = 9.0
    assert dominant_pairs(q, k, count=2).tolist() == [[False, True, True, False], [True, False, False, True]]
