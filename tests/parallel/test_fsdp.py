"""FSDP with summed gradients: unequal tokens, accumulation, HSDP and the clip equal one process."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

from parallel import fsdp, grads
from parallel.apply import parallelize
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
WIDTH, CLASSES = 12, 7
# Tokens of each microbatch on each of four ranks: unequal, one rank without any.
SHARES = [[5, 1, 0, 3], [2, 6, 4, 0]]


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH, dtype=dtype) for i in range(2)})
        self.head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x))
        return self.head(x)


def make_model(dtype: torch.dtype) -> Tiny:
    torch.manual_seed(0)
    return Tiny(dtype)


def make_tokens(microbatch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + microbatch)
    count = sum(SHARES[microbatch])
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def reference(dtype: torch.dtype, max_norm: float) -> tuple[dict[str, torch.Tensor], float]:
    model = make_model(dtype)
    loss = torch.zeros((), dtype=dtype)
    for microbatch in range(2):
        x, y = make_tokens(microbatch, dtype)
        loss = loss + nn.functional.cross_entropy(model(x), y, reduction="sum")
    (loss / sum(map(sum, SHARES))).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return {name: p.grad for name, p in model.named_parameters()}, float(norm)


def sharded_gradients(rank: int, size: int, dtype: torch.dtype, replicate: int, max_norm: float):
    mesh = build_mesh(ParallelConfig(dp_replicate=replicate, dp_shard=size // replicate), "cpu")
    model = make_model(dtype)
    policy = fsdp.FsdpPolicy(param_dtype=dtype, reduce_dtype=dtype)
    parallelize(model, model.layers.values(), mesh=mesh, policy=policy)
    sums = torch.zeros(2, dtype=torch.float64)
    for microbatch in range(2):
        fsdp.set_gradient_sync(model, microbatch == 1)
        x, y = make_tokens(microbatch, dtype)
        start = sum(SHARES[microbatch][:rank])
        mine = slice(start, start + SHARES[microbatch][rank])
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine], reduction="sum")
        loss.backward()
        sums += torch.tensor([loss.item(), len(y[mine])], dtype=torch.float64)
    total = grads.normalize_(model.parameters(), mesh=mesh, sums=sums)
    norm = grads.clip_(model.parameters(), max_norm, mesh=mesh)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return gradients, float(norm), total.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("replicate", [1, 2])
def test_every_gradient_equals_one_process(dtype, replicate):
    expected, norm = reference(dtype, max_norm=0.05)
    scale_floor = 1e-3 * torch.stack([g.abs().max() for g in expected.values()]).median()
    for gradients, found_norm, total in run_ranks(sharded_gradients, 4, dtype, replicate, 0.05):
        assert total[1] == sum(map(sum, SHARES))
        assert found_norm == pytest.approx(norm, rel=TOLERANCE[dtype])
        for name, want in expected.items():
            scale = max(want.abs().max(), scale_floor)
            assert (gradients[name] - want).abs().max() <= TOLERANCE[dtype] * scale, name


def test_zero_bound_only_measures():
    expected, norm = reference(torch.float64, max_norm=1e9)
    gradients, found, _ = run_ranks(sharded_gradients, 2 * 2, torch.float64, 1, 0.0)[0]
    assert found == pytest.approx(norm, rel=1e-10)
    torch.testing.assert_close(gradients["head.weight"], expected["head.weight"], rtol=1e-10, atol=1e-14)


def wrapped_settings(rank: int, size: int):
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    model = make_model(torch.float32)
    policy = fsdp.FsdpPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    parallelize(model, model.layers.values(), mesh=mesh, policy=policy)
    groups = [m._get_fsdp_state()._fsdp_param_group for m in fsdp.fsdp_modules(model)]
    return [(g.gradient_divide_factor, g.force_sum_reduction_for_comms) for g in groups]


def test_sum_reduction_is_set_on_every_module_not_only_the_root():
    assert run_ranks(wrapped_settings, 1)[0] == [(1.0, True)] * 3


def test_an_unwrapped_model_is_refused():
    model = make_model(torch.float32)
    assert not isinstance(model, FSDPModule)
    with pytest.raises(TypeError, match="parallelize"):
        fsdp.set_gradient_sync(model, True)
