"""Pipeline schedules: the bubble against its formula, the runtime against torch's, one long document.

1. Stages that sleep (forward 50 ms, backward 100 ms; 10 ms with --quick) on 4 gloo ranks: share of the
   ranks' time in which they do not sleep, median of three steps, against the formula, for every
   schedule, and how much of it is no waiting but the runtime's own work. Goal: at most 5% off.
2. The same embedding and stages of matrices under our runtime and under torch.distributed.pipelining
   (GPipe and 1F1B), wrapped alike, 2 ranks, in turns; also with a head of logits. Goal: at most 1.0x time.
3. One document as one microbatch on 4 ranks, whole and in 16 slices, by stages whose time is that of
   their attention and matrices. Goal: ranks wait at most 20%. With the K/V memory it costs.
"""

import os
import sys
import tempfile
import time
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from parallel import fsdp
from parallel.config import ParallelConfig
from parallel.fsdp import FsdpPolicy
from parallel.mesh import Mesh, build_mesh
from parallel.pipeline.deferred import Deferred
from parallel.pipeline.runtime import Pipeline
from parallel.pipeline.schedule import SCHEDULES, Spec, bubble, make_schedule
from parallel.pipeline.simulate import simulate
from parallel.slices import slice_bounds

WIDTH = 16
MATRIX_WIDTH = 256
VOCABULARY = 512
STEPS = 3
POLICY = FsdpPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, reshard_after_forward=False)


class Sleeper:
    """Sleeps in the place of computing, and knows for how long: the system wakes it late."""

    def __init__(self) -> None:
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        """Take time."""
        started = time.perf_counter()
        time.sleep(seconds)
        self.slept += time.perf_counter() - started


class Sleep(torch.autograd.Function):
    """Takes time in forward and backward, and leaves the weights' part for later where backward is split."""

    @staticmethod
    def forward(ctx, x, sleeper, deferred, seconds):
        """[n, E] -> [n, E]."""
        ctx.sleeper, ctx.deferred, ctx.seconds = sleeper, deferred, seconds
        sleeper.sleep(seconds[0])
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        """[n, E] -> [n, E]."""
        _, inputs, weights = ctx.seconds
        ctx.sleeper.sleep(inputs if ctx.deferred else inputs + weights)
        if ctx.deferred:
            ctx.deferred.later(lambda: ctx.sleeper.sleep(weights))
        return grad, None, None, None


class Stages(nn.Module):
    """One rank's stages under one FSDP root."""

    def __init__(self, stages: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """[n, E] -> [n, E]."""
        return self.stages[str(stage)](x)


class SleepWork:
    """A step of sleeping stages; `weights` gives each slice's share of a microbatch's time."""

    def __init__(
        self, model: nn.Module, deferred, seconds: tuple[float, float, float], weights=(1.0,)
    ) -> None:
        self.model, self.deferred, self.seconds, self.weights = model, deferred, seconds, weights
        self.sleeper = Sleeper()

    def run(self, parts, x, microbatch: int, piece: int) -> Tensor:
        """Embedding and head take no time."""
        if parts == ("head",):
            return x.sum()
        if x is None:
            x = torch.ones(1, WIDTH, requires_grad=True)
        seconds = tuple(each * self.weights[piece] for each in self.seconds)
        return Sleep.apply(self.model(x, parts[-1]), self.sleeper, self.deferred, seconds)

    def rows(self, microbatch: int, piece: int) -> int:
        """One row: the time is in the sleep."""
        return 1

    def flush(self) -> Tensor:
        """Reduce gradients."""
        x = torch.zeros(0, WIDTH, requires_grad=True)
        return sum(self.model(x, int(stage)).sum() for stage in self.model.stages)


def make(mesh: Mesh, spec: Spec, stage) -> tuple[Stages, Pipeline]:
    """One rank's wrapped stages and its runtime."""
    own = spec.placement().stages_of(mesh.coordinate("pp"))
    model = Stages({str(number): stage(number) for number in own})
    pipeline = _pipeline(mesh, spec, WIDTH)
    if pipeline.deferred is not None:
        pipeline.deferred.attach(model.stages.values())
    fsdp.shard(model, model.stages.values(), mesh=mesh, policy=POLICY)
    return model, pipeline


def _pipeline(mesh: Mesh, spec: Spec, width: int) -> Pipeline:
    return Pipeline(
        spec=spec,
        mesh=mesh,
        width=width,
        dtype=torch.float32,
        device=torch.device("cpu"),
        deferred=Deferred() if spec.splits_backward else None,
    )


def measured_bubble(
    mesh: Mesh, spec: Spec, microbatches: int, second: float, weights=(1.0,)
) -> tuple[float, float]:
    """Shares of the ranks' time in which they do not sleep, and in which they do nothing at all.

    The second leaves out the processor time of the runtime's own thread. The step of three after a warm-up
    that has the median of the first.
    """
    chunks = spec.placement().num_stages / spec.ranks
    each = second / chunks
    model, pipeline = make(mesh, spec, lambda number: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)))
    pipeline.backward(model, SleepWork(model, pipeline.deferred, (0.0, 0.0, 0.0), weights), microbatches)
    found = []
    for _ in range(STEPS):
        work = SleepWork(model, pipeline.deferred, (each, each, each), weights)
        dist.barrier()
        started, computed = time.perf_counter(), time.thread_time()
        pipeline.backward(model, work, microbatches)
        computed = time.thread_time() - computed
        dist.barrier()
        taken = time.perf_counter() - started
        busy = torch.tensor([work.sleeper.slept, computed])
        dist.all_reduce(busy)
        slept, computed = (busy / (spec.ranks * taken)).tolist()
        found.append((1 - slept, 1 - slept - computed))
    return sorted(found)[STEPS // 2]


def bubbles(rank: int, ranks: int, store: str, quick: bool, results: str) -> None:
    """Every schedule, then one document; rank 0 writes what it found."""
    mesh = _join(rank, ranks, store)
    second, count = (0.01, 4) if quick else (0.05, 8)
    figures = {}
    for name in SCHEDULES:
        spec = Spec(name=name, ranks=ranks)
        figures[f"bubble_{name}"] = (measured_bubble(mesh, spec, count, second), bubble(spec, count))
    length = 1 << 20
    bounds = slice_bounds([0, length], 16, token_cost=4096.0)
    work = [(b * b - a * a) / 2 + 4096.0 * (b - a) for a, b in pairwise(bounds)]
    total = 16 * second
    weights = tuple(total / second * each / sum(work) for each in work)
    whole = measured_bubble(mesh, Spec(ranks=ranks), 1, second, (sum(weights),))
    sliced = measured_bubble(mesh, Spec(ranks=ranks, slices=16), 1, second, weights)
    figures["document_whole"] = (whole, bubble(Spec(ranks=ranks), 1))
    figures["document_16_slices"] = (sliced, simulate(make_schedule(Spec(ranks=ranks, slices=16), 1)).bubble)
    if rank == 0:
        torch.save(figures, results)
    _leave(mesh)


def matrices(layers: int) -> nn.Sequential:
    """Linear layers with an activation between."""
    each = [(nn.Linear(MATRIX_WIDTH, MATRIX_WIDTH, bias=False), nn.SiLU()) for _ in range(layers)]
    return nn.Sequential(*(module for pair in each for module in pair))


class Half(nn.Module):
    """One rank's half of a small language model, as torch's stages are: the first takes ids."""

    def __init__(self, rank: int, layers: int, *, head: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, MATRIX_WIDTH) if rank == 0 else nn.Identity()
        # The head costs as much as two layers.
        self.layers = matrices(layers - 2 if rank and head else layers)
        self.head = nn.Linear(MATRIX_WIDTH, VOCABULARY, bias=False) if rank and head else nn.Identity()

    def forward(self, x: Tensor, parts=None) -> Tensor:
        """[n] or [n, E] -> [n, E] or [n, V]; `parts` is for our runtime, which calls the head apart."""
        if parts == ("head",):
            return self.head(x)
        y = self.layers(self.embed(x))
        return y if parts else self.head(y)


def loss_of(y: Tensor, ids: Tensor) -> Tensor:
    """Sum of the cross entropies of logits [n, V], or without a head of squares [n, E]."""
    if y.shape[1] == VOCABULARY:
        return nn.functional.cross_entropy(y, ids, reduction="sum")
    return y.square().sum()


class MatrixWork:
    """A step of matrices on given ids."""

    def __init__(self, model: nn.Module, ids: list[Tensor]) -> None:
        self.model, self.ids = model, ids

    def run(self, parts, x, microbatch: int, piece: int) -> Tensor:
        """The embedding and the layers, or the head with its loss."""
        ids = self.ids[microbatch]
        y = self.model(ids if x is None else x, parts)
        return loss_of(y, ids) if parts == ("head",) else y

    def rows(self, microbatch: int, piece: int) -> int:
        """Rows of a microbatch."""
        return len(self.ids[microbatch])

    def flush(self) -> Tensor:
        """The schedules compared here do not split backward."""
        raise AssertionError("flush is for split backward, and neither schedule has one")


def against_torch(rank: int, ranks: int, store: str, quick: bool, results: str) -> None:
    """Our runtime and torch's over the same stages, in turns."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    mesh = _join(rank, ranks, store)
    rows, layers, rounds, count = (256, 4, 2, 4) if quick else (1024, 4, 31, 8)
    ids = torch.randint(VOCABULARY, (count * rows,))
    found = {}
    for (name, schedule), head in product((("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)), (False, True)):
        model, theirs = (_half(rank, layers, mesh, head=head) for _ in range(2))
        pipeline = _pipeline(mesh, Spec(name=name, ranks=ranks), MATRIX_WIDTH)
        work = MatrixWork(model, list(ids.split(rows)))
        stage = PipelineStage(theirs, rank, ranks, torch.device("cpu"), group=mesh.group("pp").handle)
        runner = schedule(stage, count, loss_fn=loss_of, scale_grads=False)

        def ours(pipeline=pipeline, model=model, work=work) -> None:
            pipeline.backward(model, work, count)
            dist.barrier()

        def torchs(runner=runner) -> None:
            runner.step(*([ids] if rank == 0 else []), **({"target": ids} if rank == ranks - 1 else {}))
            dist.barrier()

        seconds = harness.in_turns({"ours": ours, "torch": torchs}, rounds=rounds)
        found[f"{name}_with_head" if head else name] = (
            harness.paired_ratio(seconds["ours"], seconds["torch"]),
            harness.median(seconds["ours"]),
        )
    if rank == 0:
        torch.save(found, results)
    _leave(mesh)


def _half(rank: int, layers: int, mesh: Mesh, *, head: bool) -> Half:
    model = Half(rank, layers, head=head)
    fsdp.shard(model, [model.layers], mesh=mesh, policy=POLICY)
    return model


def _join(rank: int, ranks: int, store: str) -> Mesh:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    return build_mesh(ParallelConfig(pp=ranks), "cpu")


def _leave(mesh: Mesh) -> None:
    mesh.close()
    dist.destroy_process_group()


def spawn(function, ranks: int, quick: bool) -> dict:
    """What rank 0 of `ranks` processes found."""
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder) / "results")
        mp.spawn(function, (ranks, str(Path(folder) / "store"), quick, results), nprocs=ranks)
        return torch.load(results, weights_only=True)


def main() -> None:
    """Print the table."""
    args = harness.parser(__doc__).parse_args()
    figures = {}
    for name, ((found, idle), formula) in spawn(bubbles, 4, args.quick).items():
        figures[name] = harness.Figure(found, "ratio", f"formula {formula:.4f}")
        figures[f"{name}_off"] = harness.Figure(found - formula, "ratio", "measured - formula; goal 0.05")
        note = "the same, without the processor time of the runtime itself"
        figures[f"{name}_idle_off"] = harness.Figure(idle - formula, "ratio", note)
    for name, (ratio, seconds) in spawn(against_torch, 2, args.quick).items():
        figures[f"{name}_over_torch"] = harness.Figure(ratio, "ratio", "ours / torch; goal at most 1.0")
        figures[f"{name}_step"] = harness.Figure(1e3 * seconds, "ms", "ours")
    tokens, kv_heads, head_dim, layers = 1 << 20, 8, 128, 8
    kept = 2 * tokens * kv_heads * head_dim * layers * 2 / 2**30
    note = "K and V of 1M tokens on one stage of 8 of 32 layers, 8 heads of 128, bf16; by formula"
    figures["kept_kv"] = harness.Figure(
        kept, "GiB", note + "; gradients in float32 add twice as much in backward"
    )
    harness.report(__file__, figures, args)


if __name__ == "__main__":
    sys.exit(main())
