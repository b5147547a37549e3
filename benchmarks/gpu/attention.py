"""One GPU: TFLOP/s of every attention kernel that runs there, and what our wrappers cost.

Causal attention of one document in bf16, 8K to 512K tokens, head dim 64 and 128 (2048 query columns in
all: 32 or 16 heads, a quarter as many key heads; cuDNN takes equal counts and gets as many key
heads). Forward counts 2 S^2 H D operations (half of a full matrix), backward 2.5 times that. All
kernels of one size are measured in turns. The wrapper's cost is `make_attention("local")` against
the same kernel called directly, forward and backward; goal: at most 3%.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import torch
import torch.distributed as dist

from parallel.attention import make_attention
from parallel.attention.backends import KERNELS, Needs, refusal
from parallel.attention.kernels import Kernel
from parallel.attention.tiles import Tile, TileBatch, batches
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import Mesh, build_mesh

LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072, "512k": 524288}
COLUMNS = 2048
ROUNDS = 5
Run = Callable[[], None]
Tensors = list[torch.Tensor]


def tensors(tokens: int, head_dim: int, *, grouped: bool, seed: int) -> Tensors:
    """q, k, v and the gradient of out."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = COLUMNS // head_dim
    counts = (heads, heads // 4, heads // 4, heads) if grouped else (heads,) * 4
    shapes = [(tokens, n, head_dim) for n in counts]
    make = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    return [torch.randn(shape, **make) for shape in shapes]


def bare(kernel: Kernel, given: Tensors) -> tuple[Run, Run]:
    """The kernel itself on one causal tile: forward, backward."""
    q, k, v, dout = given
    (batch,) = batches([Tile(0, q.shape[0], 0, q.shape[0], 0)], None)
    assert isinstance(batch, TileBatch)
    scale = q.shape[2] ** -0.5
    out, lse = kernel.forward(q, k, v, batch=batch, scale=scale)

    def forward() -> None:
        kernel.forward(q, k, v, batch=batch, scale=scale)
        torch.cuda.synchronize()

    def backward() -> None:
        kernel.backward(dout, q, k, v, out, lse, batch=batch, scale=scale)
        torch.cuda.synchronize()

    return forward, backward


def wrapped(name: str, mesh: Mesh, given: Tensors) -> Run:
    """Forward and backward through `make_attention`."""
    q, k, v = (x.clone().requires_grad_() for x in given[:3])
    layout = SequenceLayout.build([0, q.shape[0]], ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    attend = make_attention("local", mesh, kernel=name)

    def both() -> None:
        out = attend(q, k, v, layout=layout)
        torch.autograd.grad(out, (q, k, v), given[3])
        torch.cuda.synchronize()

    return both


def measure(figures: dict, mesh: Mesh, size: tuple[str, int], seed: int) -> None:
    """All kernels at one length and head dim."""
    length, head_dim = size
    tokens = LENGTHS[length]
    candidates: dict[str, Run] = {}
    for kernel in (k for k in KERNELS if "cuda" in k.devices and k.name != "torch"):
        key = f"{kernel.name}_{length}_d{head_dim}"
        needs = Needs(form="causal", device="cuda", dtype=torch.bfloat16, head_dim=head_dim)
        reason = refusal(kernel, needs)
        if reason is not None:
            figures[key] = harness.Figure(None, "TFLOP/s", reason)
            continue
        given = tensors(tokens, head_dim, grouped=kernel.gqa, seed=seed)
        candidates[f"{key}_forward"], candidates[f"{key}_backward"] = bare(kernel, given)
        candidates[f"{key}_wrapped"] = wrapped(kernel.name, mesh, given)
    seconds = harness.in_turns(candidates, rounds=ROUNDS)
    operations = 2 * tokens**2 * COLUMNS / 1e12
    for name, values in seconds.items():
        key, what = name.rsplit("_", 1)
        if what == "wrapped":
            direct = [
                a + b for a, b in zip(seconds[f"{key}_forward"], seconds[f"{key}_backward"], strict=True)
            ]
            ratio = harness.paired_ratio(values, direct)
            figures[f"{key}_wrapper"] = harness.Figure(ratio, "ratio", "ours / bare; goal <= 1.03")
        else:
            work = operations * (2.5 if what == "backward" else 1.0)
            figures[name] = harness.Figure(work / harness.median(values), "TFLOP/s", "causal operations")


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention needs a CUDA device; none is visible")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = build_mesh(ParallelConfig(), "cuda")
    figures: dict[str, harness.Figure] = {}
    sizes = [(length, head_dim) for length in LENGTHS for head_dim in (64, 128)]
    for size in sizes[: 2 if args.quick else None]:
        measure(figures, mesh, size, args.seed)
        torch.cuda.empty_cache()
    harness.report(__file__, figures, args)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
