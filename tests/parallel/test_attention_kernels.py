"""The seam for variable-length kernels: packed rows and offsets mean what the tiles mean."""

import dataclasses

import pytest
import sequence_cases
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sequence_cases import cases

from parallel.attention import backends
from parallel.attention.kernel_torch import TORCH
from parallel.attention.kernels import packed, packing
from parallel.attention.tiles import Tile, TileBatch
from parallel.attention.tiles import batches as group_tiles
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

ONCE = settings(
    max_examples=2, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)


def as_varlen(batch, device):
    """The batch that a variable-length kernel sees: the same tiles on packed rows."""
    offsets = packing(batch, device)
    starts = zip(batch.tiles, offsets.cu_q.tolist(), offsets.cu_k.tolist(), strict=False)
    tiles = tuple(dataclasses.replace(tile, q=q, k=k) for tile, q, k in starts)
    assert offsets.max_q == max(t.rows for t in tiles) and offsets.max_k == max(t.columns for t in tiles)
    return dataclasses.replace(batch, tiles=tiles, cache={})


def forward(q, k, v, *, batch, scale):
    keys = [packed(x, batch, keys=True) for x in (k, v)]
    return TORCH.forward(packed(q, batch, keys=False), *keys, batch=as_varlen(batch, q.device), scale=scale)


def backward(dout, q, k, v, out, lse, *, batch, scale):  # noqa: PLR0913 -- see kernels.Backward
    dout, q, out = (packed(x, batch, keys=False) for x in (dout, q, out))
    k, v = (packed(x, batch, keys=True) for x in (k, v))
    lse = packed(lse, batch, keys=False, dim=1)
    return TORCH.backward(dout, q, k, v, out, lse, batch=as_varlen(batch, q.device), scale=scale)


VARLEN = dataclasses.replace(TORCH, name="varlen", forward=forward, backward=backward, varlen=True)


def check(rank, size, drawn):
    backends.KERNELS = (VARLEN,)
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    return [case for case in drawn if max(sequence_cases.errors(case, mesh)) > 1e-10]


@pytest.mark.parametrize("size", [1, 4])
def test_a_variable_length_kernel_on_packed_rows_is_exact(size):
    @ONCE
    @given(st.lists(cases(size), min_size=12, max_size=12))
    def run(drawn):
        assert run_ranks(check, size, drawn) == [[]] * size

    run()


def test_consecutive_rows_are_not_copied():
    (batch,) = group_tiles([Tile(0, 3, 0, 3, 0), Tile(3, 2, 3, 2, 0)], None)
    x = torch.randn(6, 2, 4)
    assert packed(x, batch, keys=False).data_ptr() == x.data_ptr()
    assert packing(batch, x.device).cu_q.tolist() == [0, 3, 5]
    assert packing(batch, x.device).cu_q.dtype == torch.int32
    assert packing(batch, x.device) is packing(batch, x.device)


def test_scattered_rows_are_gathered():
    (batch,) = group_tiles([Tile(4, 1, 0, 2), Tile(0, 2, 0, 3)], None)
    x = torch.arange(6.0)
    assert isinstance(batch, TileBatch) and (batch.q_span, batch.k_span) == (None, None)
    assert packed(x, batch, keys=False).tolist() == [4, 0, 1]
    assert packed(x, batch, keys=True).tolist() == [0, 1, 0, 1, 2]
