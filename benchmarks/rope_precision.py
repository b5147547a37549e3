"""How far logits drift with the position when only the distance of query and key should count.

A random query and key of 128 dims at a fixed distance are rotated at positions up to 4M and multiplied. In
exact arithmetic the product does not depend on the position. Paths: angles in float64 (ours), in float32 and
in bfloat16, each rotated in float32, and ours rotated in bfloat16. The curves lie beside the result file.

`step_cost` is what positions cost a training step: gradients of one sequence of 8K tokens through the
quickstart's model with them and without (`none`), in turns.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import torch
from torch.distributed import HashStore

from longctx.build import World, build
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.config.schema import RopeConfig
from longctx.rope.apply import rotate
from longctx.rope.frequencies import rope_parameters
from longctx.rope.tables import Frequencies, RopeTable
from longctx.train.step import backward

HEAD_DIM, DISTANCE, PAIRS = 128, 17, 64
CONFIG = RopeConfig(head_dim=HEAD_DIM, theta=500000.0)
Table = Callable[[torch.Tensor], RopeTable]


def float64_angles(positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> RopeTable:
    """The table that training uses."""
    return Frequencies.of(CONFIG).table(positions, None, dtype=dtype)


def narrow_angles(dtype: torch.dtype) -> Table:
    """Positions times frequencies in `dtype`, as implementations without a float64 table do."""
    inv_freq = rope_parameters(CONFIG)[0].to(dtype)

    def table(positions: torch.Tensor) -> RopeTable:
        angles = (positions.to(dtype)[:, None] * inv_freq).float()[:, None]  # [t, 1, P]
        return RopeTable(angles.cos(), angles.sin())

    return table


def drift(table: Table, position: int, dtype: torch.dtype, seed: int) -> float:
    """Largest |product at a position - product at 0| over the mean |product|, over 64 random pairs."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, PAIRS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))

    def products(at: int, form: Table, kind: torch.dtype) -> torch.Tensor:
        positions = torch.tensor([at + DISTANCE, at])
        turned = rotate(torch.cat((q, k)).to(kind), form(positions)).double()
        return (turned[0] * turned[1]).sum(-1)

    exact = products(0, lambda p: float64_angles(p, torch.float64), torch.float64)
    return float((products(position, table, dtype) - exact).abs().max() / exact.abs().mean())


def step_cost(*, quick: bool) -> harness.Figure:
    """Step time with positions over step time without."""
    tokens = 512 if quick else 8192
    overrides = [f"data.seq_len={tokens}", f"train.global_batch_tokens={tokens}", "data.workers=1"]
    config = resolve(load(["recipes/quickstart.yaml"], overrides).config, 1, "cpu")
    run = build(config, World(rank=0, size=1, device=torch.device("cpu"), store=HashStore()))
    batch = run.loader.step(0)
    forms = {"with": run.model.frequencies, "without": Frequencies.of(RopeConfig(type="none", head_dim=2))}

    def step(form: Frequencies) -> None:
        run.model.frequencies = form
        backward(run, batch)
        run.optimizer.zero_grad()

    runs = {name: partial(step, form) for name, form in forms.items()}
    seconds = harness.in_turns(runs, rounds=1 if quick else 9)
    run.close()
    note = f"{harness.median(seconds['with']):.2f} s with positions; goal <= 1.02"
    return harness.Figure(harness.paired_ratio(seconds["with"], seconds["without"]), "ratio", note)


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    paths = {
        "float64_angles_float64": (lambda p: float64_angles(p, torch.float64), torch.float64),
        "float64_angles_float32": (float64_angles, torch.float32),
        "float64_angles_bfloat16": (float64_angles, torch.bfloat16),
        "float32_angles_float32": (narrow_angles(torch.float32), torch.float32),
        "bfloat16_angles_float32": (narrow_angles(torch.bfloat16), torch.float32),
    }
    positions = [2**n for n in (range(8, 23, 7) if args.quick else range(8, 23))]
    curves = {
        name: [drift(table, position, dtype, args.seed) for position in positions]
        for name, (table, dtype) in paths.items()
    }
    figures = {
        f"{name}_at_{position}": harness.Figure(value, "ratio", "largest drift / mean |q k|")
        for name, values in curves.items()
        for position, value in zip(positions, values, strict=True)
        if position in (positions[0], 2**17, 2**20, positions[-1])
    }
    figures["step_cost"] = step_cost(quick=args.quick)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.out.with_suffix(".png"), positions, curves)
    harness.report(__file__, figures, args)
    return 0


def draw(path: Path, positions: list[int], curves: dict[str, list[float]]) -> None:
    """Drift against position, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.loglog(positions, values, marker=".", label=name.replace("_", " "))
    axes.set_xlabel("position in tokens")
    axes.set_ylabel("largest drift of a logit / mean |logit|")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
