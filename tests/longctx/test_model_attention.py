"""The decoder on the runtime's own attention equals the decoder on a dense mask."""

import dense
import pytest
import torch
from ranks import run_ranks

from longctx.config.schema import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.init import init_parameters_
from longctx.model.loss import token_loss
from parallel.attention import make_attention
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "head_dim": 8, "vocab_size": 64}
LENGTHS = (5, 1, 18)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def step(attend, layout, config, dtype, lengths):
    """Logits and gradients as numpy arrays."""
    model = Decoder(config, attend).to(dtype)
    init_parameters_(model, 0, config)
    ids = torch.arange(sum(lengths)) * 7 % 64
    logits = model(ids, dense.positions(lengths), layout=layout)
    token_loss(logits, ids.roll(-1), torch.ones(len(ids), dtype=torch.bool))[0].backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {"logits": logits.detach().numpy()} | grads


def on_local_attention(rank, size, config, dtype, lengths):
    attend = make_attention("local", build_mesh(ParallelConfig(), "cpu"))
    layout = SequenceLayout.build(
        dense.packed(lengths).cu_seqlens, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0
    )
    return step(attend, layout, config, dtype, lengths)


@pytest.mark.parametrize("lengths", [LENGTHS, ()])
@pytest.mark.parametrize("keys", [{}, {"sliding_window": 4}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_local_attention_equals_the_dense_mask(keys, dtype, lengths):
    config = ModelConfig(**SMALL, **keys)
    (ours,) = run_ranks(on_local_attention, 1, config, dtype, lengths)
    expected = step(dense.attend, dense.packed(lengths), config, dtype, lengths)
    largest = {name: abs(value).max(initial=0.0) for name, value in expected.items()}
    floor = 1e-3 * sorted(largest.values())[len(largest) // 2]
    for name, value in expected.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype
        assert abs(ours[name] - value).max(initial=0.0) <= TOLERANCE[dtype] * max(largest[name], floor), name
