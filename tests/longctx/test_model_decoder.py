"""The decoder: names, packing, empty ranks, FSDP2 and mixed precision."""

import dense
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from longctx.config.schema import ModelConfig, RopeConfig
from longctx.errors import ConfigError
from longctx.model.decoder import Decoder
from longctx.model.init import init_parameters_
from longctx.model.layers import rms_norm
from longctx.model.loss import token_loss
from longctx.model.params import num_parameters, parameter_shapes

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "head_dim": 8, "vocab_size": 64}
VARIANTS = {
    "plain": ModelConfig(**SMALL, tied_embeddings=False),
    "tied": ModelConfig(**SMALL),
    "bias": ModelConfig(**SMALL, attention_bias=True),
    "qk_norm": ModelConfig(**SMALL, qk_norm=True),
    "window": ModelConfig(**SMALL, sliding_window=4),
    "all heads": ModelConfig(**SMALL, num_kv_heads=4),
}


def build(config, dtype=torch.float64, attend=dense.attend):
    model = Decoder(config, attend).to(dtype)
    init_parameters_(model, 0, config)
    return model


def run(model, lengths, rope_id=None):
    ids = torch.arange(sum(lengths)) * 7 % 64
    return model(ids, dense.positions(lengths), rope_id, layout=dense.packed(lengths))


def backward(model, lengths):
    logits = run(model, lengths)
    mask = torch.ones(len(logits), dtype=torch.bool)
    loss_sum, _ = token_loss(logits, torch.arange(len(logits)) % 64, mask)
    loss_sum.backward()
    return loss_sum


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_the_config_predicts(variant):
    with torch.device("meta"):
        model = Decoder(VARIANTS[variant], dense.attend)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert named == parameter_shapes(VARIANTS[variant])
    assert sum(p.numel() for p in model.parameters()) == num_parameters(VARIANTS[variant]).total
    assert all(p.is_meta for p in model.parameters()) and list(model.buffers()) == []
    assert not model.frequencies.inv_freq.is_meta


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_do_not_see_each_other(variant):
    model = build(VARIANTS[variant])
    packed = run(model, (5, 1, 9))
    ids = torch.arange(15) * 7 % 64
    for part, logits in zip(ids.split((5, 1, 9)), packed.split((5, 1, 9)), strict=True):
        alone = model(part, torch.arange(len(part)), layout=dense.packed((len(part),)))
        torch.testing.assert_close(logits, alone, rtol=1e-12, atol=1e-12)


def test_window_limits_what_a_token_sees():
    """Through two layers with a window of 4, token 12 depends on tokens 6 to 12."""
    model = build(VARIANTS["window"])
    ids, layout = torch.arange(13), dense.packed((13,))
    base = model(ids, torch.arange(13), layout=layout)[12]
    changed = [
        model(ids.index_fill(0, torch.tensor([i]), 50), torch.arange(13), layout=layout)[12]
        for i in range(13)
    ]
    assert [i for i, logits in enumerate(changed) if not torch.equal(logits, base)] == list(range(6, 13))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_without_tokens_has_zero_gradients_for_every_parameter(variant):
    model = build(VARIANTS[variant])
    loss_sum = backward(model, ())
    assert loss_sum == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_rope_id_of_the_only_table_changes_nothing():
    model = build(VARIANTS["plain"])
    assert torch.equal(run(model, (5, 3)), run(model, (5, 3), rope_id=torch.zeros(8, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)]
)
def test_rms_norm_equals_the_formula_with_gradients(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (12, 1, 12))
    x, weight, grad = x.view(4, 3, 16).to(dtype), weight[0].to(dtype), grad.view(4, 3, 16).to(dtype)
    results = []
    for norm, wide in ((rms_norm, dtype), (lambda x, w, eps: F.rms_norm(x, (16,), w, eps), torch.float64)):
        inputs = x.to(wide).requires_grad_(), weight.to(wide).requires_grad_()
        out = norm(*inputs, 1e-5)
        assert out.dtype == wide
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(wide))))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def sharded_step(rank, size, dtype, lengths):
    """Loss and gradients under FSDP2 when only rank 0 has tokens."""
    model = build(VARIANTS["bias"], torch.float32)
    mesh = init_device_mesh("cpu", (size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    seen = []
    attention = model.layers["1"].attention
    attention.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[1].cos.dtype)))
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    loss_sum = backward(model, lengths if rank == 0 else ())
    grads = {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}
    return loss_sum.item(), grads, seen


@pytest.mark.parametrize("size", [1, 3])
def test_fsdp_with_ranks_without_tokens_equals_one_process(size):
    reference = build(VARIANTS["bias"], torch.float32)
    expected = backward(reference, (6, 11))
    results = run_ranks(sharded_step, size, torch.float32, (6, 11))
    assert results[0][0] == pytest.approx(expected.item(), rel=1e-6)
    for _, grads, _ in results:
        for name, parameter in reference.named_parameters():
            bound = 1e-5 * parameter.grad.abs().max() + 1e-7
            assert (torch.from_numpy(grads[name]) - parameter.grad).abs().max() <= bound, name


def test_mixed_precision_leaves_the_rope_table_in_float32():
    """FSDP2 casts the floating tensors among a block's arguments; a bfloat16 cosine destroys positions."""
    ((_, _, seen),) = run_ranks(sharded_step, 1, torch.bfloat16, (6, 11))
    assert seen == [(torch.bfloat16, torch.float32)]


def test_attention_takes_the_head_count_from_its_projections():
    """A tensor-parallel rank holds some of the heads; nothing but the projections may know."""
    model = build(VARIANTS["plain"])
    for block in model.layers.values():
        attention = block.attention
        for name in ("wq", "wk", "wv"):
            weight = getattr(attention, name).weight
            setattr(attention, name, nn.Linear(32, len(weight) // 2, bias=False, dtype=weight.dtype))
        attention.wo = nn.Linear(attention.wo.in_features // 2, 32, bias=False, dtype=torch.float64)
    assert run(model, (4, 3)).shape == (7, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), "vocab_size=auto"),
        (ModelConfig(**SMALL, rope=RopeConfig(head_dim=16)), "rope.head_dim=16 differs"),
        (ModelConfig(**SMALL, rope=RopeConfig(factor=2.0)), "rope.factor=2.0 does not belong"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(config, dense.attend)
