"""Initial parameters are the same bits whatever the layout."""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from longctx.config.schema import ModelConfig
from longctx.model import init as module
from longctx.model.decoder import Decoder
from longctx.model.init import init_parameters_

# 90 rows do not divide by 4, and 20 do not divide by 3: shards are uneven, some empty.
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=20,
    ffn_size=26,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=90,
    qk_norm=True,
    attention_bias=True,
    tied_embeddings=False,
)


def fresh(seed=0, config=CONFIG, dtype=torch.float32):
    with torch.device("meta"):
        model = Decoder(config, None).to(dtype)
    model.to_empty(device="cpu")
    init_parameters_(model, seed, config)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sharded(rank, size, seed, block_elements):
    module.BLOCK_ELEMENTS = block_elements
    mesh = init_device_mesh("cpu", (size,))
    with torch.device("meta"):
        model = Decoder(CONFIG, None)
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    init_parameters_(model, seed, CONFIG)
    return {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("block_elements", [1 << 20, 200])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_fsdp_shards_hold_the_same_bits(size, block_elements, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block_elements)
    whole = fresh(seed=7)
    for rank in run_ranks(sharded, size, 7, block_elements):
        assert rank.keys() == whole.keys()
        assert [name for name in whole if not np.array_equal(rank[name], whole[name].numpy())] == []


def placed(rank, size, placements):
    mesh = init_device_mesh("cpu", (2, size // 2))
    model = nn.Module()
    model.ffn = nn.Module()
    model.ffn.down = nn.Linear(26, 20, bias=False)
    down = distribute_tensor(model.ffn.down.weight.detach(), mesh, placements)
    model.ffn.down.weight = nn.Parameter(down)
    init_parameters_(model, 7, CONFIG)
    assert isinstance(model.ffn.down.weight, DTensor)
    return model.ffn.down.weight.full_tensor().detach().numpy()


@pytest.mark.parametrize("placements", [(Shard(1), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Shard(1))])
def test_two_dimensional_shards_hold_the_same_bits(placements, monkeypatch):
    expected = nn.Module()
    expected.ffn = nn.Module()
    expected.ffn.down = nn.Linear(26, 20, bias=False)
    init_parameters_(expected, 7, CONFIG)
    for result in run_ranks(placed, 4, placements):
        assert np.array_equal(result, expected.ffn.down.weight.detach().numpy())


def test_what_each_parameter_gets():
    config = ModelConfig(
        num_layers=8, hidden_size=128, vocab_size=1024, init_std=0.05, attention_bias=True, qk_norm=True
    )
    for name, value in fresh(config=config).items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith(".bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            residual = name.endswith(("attention.wo.weight", "ffn.down.weight"))
            std = 0.05 / math.sqrt(2 * 8) if residual else 0.05
            spread = 5 / math.sqrt(2 * value.numel())  # five standard errors of a standard deviation
            assert value.std().item() == pytest.approx(std, rel=spread), name
            assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name


def test_seed_and_name_decide():
    first, again, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "layers.0.ffn.gate.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["layers.1.ffn.gate.weight"])
    assert not torch.equal(first[name], first["layers.0.ffn.up.weight"])


def test_blocks_of_one_parameter_differ(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 20 * 45)
    embedding = fresh()["embedding.weight"]
    assert not torch.equal(embedding[:45], embedding[45:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_hold_the_float32_values(dtype):
    single = fresh()
    assert all(torch.equal(value, single[name].to(dtype)) for name, value in fresh(dtype=dtype).items())


def test_values_are_pinned():
    """A change here changes the start of every run with the same seed."""
    value = fresh()["layers.1.attention.wo.weight"]
    assert value[0, :3].tolist() == pytest.approx([2.630831e-3, 1.270680e-2, -7.729580e-3], rel=1e-5)


def test_a_parameter_without_a_rule_is_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="scale"):
        init_parameters_(model, 0, CONFIG)
