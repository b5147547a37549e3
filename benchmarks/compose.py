"""Tensor parallelism against its peers, and the cost of composing at scale.

Two gloo ranks, in turns in one run: a stack of gated feed-forwards split by our rules, by DTensor's
`parallelize_module` and by megatron-core's Column/RowParallelLinear, forward and backward, the same
weights. Then, on a fake process group, rank 0 of 4,096 ranks sets up mesh and sharded model. Then the
calls and bytes that a step's tensor parallelism makes, against the formula.
Goal: ours / DTensor <= 1.0 time.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from parallel.config import ParallelConfig
from parallel.fsdp import FsdpPolicy
from parallel.mesh import build_mesh

RANKS = 2
SCALE = 4096


class Ffn(nn.Module):
    """silu(gate(x)) * up(x), then down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        """[n, E] -> [n, E]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    """Residual feed-forwards."""

    def __init__(self, layers: int, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, inner) for _ in range(layers)])

    def forward(self, x):
        """[n, E] -> [n, E]."""
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    """One residual feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ffn = Ffn(width, inner)

    def forward(self, x):
        """[n, E] -> [n, E]."""
        return x + self.ffn(x)


class MegatronFfn(nn.Module):
    """The same from megatron-core's layers: gate and up in one column-split matrix, as it does."""

    def __init__(self, whole: Ffn, config, group) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        inner, width = whole.gate.weight.shape
        shared = {"config": config, "init_method": nn.init.zeros_, "bias": False, "tp_group": group}
        self.gate_up = ColumnParallelLinear(width, 2 * inner, gather_output=False, **shared)
        self.down = RowParallelLinear(inner, width, input_is_parallel=True, skip_bias_add=False, **shared)
        rank, part = dist.get_rank(group), inner // dist.get_world_size(group)
        mine = slice(rank * part, (rank + 1) * part)
        with torch.no_grad():
            self.gate_up.weight.copy_(torch.cat((whole.gate.weight[mine], whole.up.weight[mine])))
            self.down.weight.copy_(whole.down.weight[:, mine])

    def forward(self, x):
        """[t, E] -> [t, E]."""
        gate, up = self.gate_up(x[:, None])[0].chunk(2, -1)
        return self.down(F.silu(gate) * up)[0][:, 0]


def make_stack(sizes) -> Stack:
    torch.manual_seed(0)
    return Stack(*sizes)


def make_ours(sizes, mesh) -> nn.Module:
    from parallel.tensor.split import split

    model = make_stack(sizes)
    split(model, model.layers, mesh=mesh)
    model._forward_hooks.clear()  # the stack takes rows, not token ids
    return model


def make_dtensor(sizes, mesh) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    model = make_stack(sizes)
    for block in model.layers:
        plan = {
            "ffn": PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),)),
            "ffn.gate": ColwiseParallel(),
            "ffn.up": ColwiseParallel(),
            "ffn.down": RowwiseParallel(output_layouts=Shard(0)),
        }
        parallelize_module(block, mesh.tp_mesh, plan)
    return model


def make_megatron(sizes, mesh) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=mesh.size("tp"))
    config = ModelParallelConfig(
        tensor_model_parallel_size=mesh.size("tp"), use_cpu_initialization=True, perform_initialization=False
    )
    model = make_stack(sizes)
    for block in model.layers:
        block.ffn = MegatronFfn(block.ffn, config, mesh.group("tp").handle)
    return model


def compare(rank: int, folder: str, sizes, tokens: int, rounds: int) -> None:
    """One of the two ranks: build the three, check that they agree, time them in turns."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = build_mesh(ParallelConfig(tp=RANKS), "cpu")
    models = {"ours": make_ours(sizes, mesh), "dtensor": make_dtensor(sizes, mesh)}
    failure = ""
    try:
        models["megatron"] = make_megatron(sizes, mesh)
    except ImportError as error:
        failure = str(error)
    x = torch.randn(tokens, sizes[1], generator=torch.Generator().manual_seed(1))
    part = tokens // RANKS
    inputs = dict.fromkeys(models, x[rank * part : (rank + 1) * part])
    inputs["megatron"] = x  # it keeps tokens whole and all-reduces: its split buffers live on CUDA only

    def step(name):
        out = models[name](inputs[name].clone().requires_grad_())
        out.square().sum().backward()

    mesh.counter.reset()
    step("ours")
    counted = (dict(mesh.counter.calls), dict(mesh.counter.sent_bytes))
    with torch.no_grad():
        whole = make_stack(sizes)(x)
        wanted = {name: whole if name == "megatron" else whole[rank * part :][:part] for name in models}
        errors = [float((models[n](inputs[n]) - wanted[n]).abs().max()) for n in models]
    assert max(errors) < 1e-4, f"the candidates compute different things: {errors}"
    seconds = harness.in_turns({name: lambda n=name: step(n) for name in models}, rounds=rounds)
    if rank == 0:
        torch.save((seconds, counted, failure), f"{folder}/result.pt")
    dist.barrier()
    os._exit(0)  # megatron's groups outlive the default one


def at_scale(quick: bool) -> None:
    """Rank 0 of 4,096: mesh, then a sharded model on meta; prints seconds and MiB."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from longctx.config.schema import ModelConfig, RopeConfig
    from longctx.model.decoder import Decoder
    from parallel.apply import parallelize

    world = 64 if quick else SCALE
    start = time.perf_counter()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = build_mesh(ParallelConfig(dp_shard=world // 64, ulysses=8, tp=8), "cpu")
    meshed = time.perf_counter()
    config = ModelConfig(
        num_layers=4, hidden_size=4096, ffn_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
        vocab_size=128256, rope=RopeConfig(head_dim=128),
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config, lambda q, *_, **__: q)
    policy = FsdpPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallelize(model, model.layers.values(), mesh=mesh, policy=policy)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(meshed - start, done - meshed, peak)


def main() -> int:
    """Measure and report."""
    parser = harness.parser(__doc__)
    parser.add_argument("--at-scale", action="store_true", help="measure only the set-up, in this process")
    args = parser.parse_args()
    if args.at_scale:
        at_scale(args.quick)
        return 0
    sizes, tokens, rounds = ((2, 64, 128), 64, 2) if args.quick else ((4, 512, 1536), 1024, 15)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, args=(folder, sizes, tokens, rounds), nprocs=RANKS, start_method="spawn")
        seconds, (calls, sent), failure = torch.load(Path(folder, "result.pt"), weights_only=False)
    shape = f"{sizes[0]} layers, E {sizes[1]}, F {sizes[2]}, {tokens} tokens, forward and backward"
    figures = {
        f"tp2_{name}_ms": harness.Figure(1000 * harness.median(s), "ms", shape) for name, s in seconds.items()
    }
    ratio = harness.paired_ratio(seconds["ours"], seconds["dtensor"])
    figures["tp2_ours_over_dtensor"] = harness.Figure(ratio, "ratio", "goal <= 1.0")
    if "megatron" in seconds:
        ratio = harness.paired_ratio(seconds["ours"], seconds["megatron"])
        note = "its sequence_parallel=False: with it, buffers are made on CUDA"
        figures["tp2_ours_over_megatron"] = harness.Figure(ratio, "ratio", note)
    else:
        figures["tp2_ours_over_megatron"] = harness.Figure(None, "ratio", failure)
    figures |= counted_figures(calls, sent, sizes, tokens) | scale_figures(args.quick)
    harness.report(__file__, figures, args)
    return 0


def counted_figures(calls, sent, sizes, tokens):
    """Per layer and direction one all-gather and one reduce-scatter of (R - 1) n E elements."""
    layers, width = sizes[:2]
    expected = 2 * layers * (RANKS - 1) * (tokens // RANKS) * width * 4
    figures = {}
    for kind in ("all_gather", "reduce_scatter"):
        figures[f"{kind}_calls_over_formula"] = harness.Figure(calls[kind] / (2 * layers), "ratio", "goal 1")
        figures[f"{kind}_bytes_over_formula"] = harness.Figure(sent[kind] / expected, "ratio", "goal 1")
    return figures


def scale_figures(quick):
    """Set-up of one rank among very many, in a process of its own for its memory."""
    command = [sys.executable, __file__, "--at-scale", *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
    mesh_s, model_s, peak = map(float, done.stdout.split()[-3:])
    world = 64 if quick else SCALE
    note = f"{world} ranks: dp_shard {world // 64} x ulysses 8 x tp 8, fake process group"
    return {
        "scale_mesh_s": harness.Figure(mesh_s, "s", note),
        "scale_model_s": harness.Figure(model_s, "s", "4 layers of an 8B model, split and sharded on meta"),
        "scale_peak_mib": harness.Figure(peak, "MiB", "resident memory of the rank, torch included"),
    }


if __name__ == "__main__":
    sys.exit(main())
