"""A tiny model trained at 256 tokens on the Python standard library's source, extended 8 times.

Every method is read zero-shot and after a short fine-tuning at the target length, from the same trained
weights, by the held-out loss in buckets of positions; remaps of positions need no fine-tuning. Bands are the
smallest and largest of the seeds. The curves are drawn beside the result file. What the literature reports:
without an extension the loss explodes past the window, linear interpolation hurts everywhere, NTK fails near
the target and YaRN stays flat; here is what this model does.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from torch.distributed import HashStore

from longctx.build import Run, World, build
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.data.sources import open_data
from longctx.eval.evaluate import evaluate
from longctx.train.schedule import learning_rate
from longctx.train.step import train_step

WINDOW, FACTOR = 256, 8
TARGET = WINDOW * FACTOR
_EXTENDED = (f"model.rope.original_len={WINDOW}",)
_BY_FACTOR = (*_EXTENDED, f"model.rope.factor={FACTOR}")
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("model.rope.type=linear", *_BY_FACTOR),
    "ntk": ("model.rope.type=ntk", *_BY_FACTOR),
    "dynamic": ("model.rope.type=dynamic", *_BY_FACTOR),
    "abf": ("model.rope.type=abf", "model.rope.extended_theta=500000", *_EXTENDED),
    "llama3": ("model.rope.type=llama3", *_BY_FACTOR),
    "truncated": ("model.rope.type=truncated", *_EXTENDED),
    "power": ("model.rope.type=power", "model.rope.power=0.5", *_EXTENDED),
    "yarn": ("model.rope.type=yarn", *_BY_FACTOR),
    "dynamic_yarn": ("model.rope.type=dynamic_yarn", *_EXTENDED),
}
REMAPS: dict[str, tuple[str, ...]] = {
    "string": ("eval.remap.type=string", "eval.remap.window=96", "eval.remap.local=32"),
    "self_extend": ("eval.remap.type=self_extend", "eval.remap.window=64", "eval.remap.group=16"),
    "lm_infinite": ("eval.remap.type=lm_infinite", "eval.remap.sinks=8"),
}


@dataclass(kw_only=True)
class Curves:
    """Losses by bucket, one list for each seed."""

    zero_shot: dict[str, list[list[float]]] = field(default_factory=dict)
    tuned: dict[str, list[list[float]]] = field(default_factory=dict)


def settings(args: Any, folder: Path, seed: int) -> list[str]:
    """Overrides of the quickstart recipe that training and extension share."""
    return [
        f"data.cache_dir={args.cache or folder / 'cache'}",
        f"run.dir={folder}",
        f"run.seed={seed}",
        "data.workers=1",
        "data.held_out=0.05",
        "model.num_layers=3",
        "model.hidden_size=64",
        "model.ffn_size=192",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.head_dim=32",
        "model.rope.theta=10000",
        "train.lr=4e-3",
        "train.warmup_steps=10",
        "train.global_batch_tokens=8192",
        "train.microbatch_tokens=8192",
        "eval.tasks=[loss]",
        f"eval.lengths=[{TARGET}]",
        f"eval.documents={2 if args.quick else 24}",
    ]


def started(overrides: list[str], shards: dict[str, torch.Tensor] | None = None) -> Run:
    """A run in this process."""
    config = resolve(load(["recipes/quickstart.yaml"], overrides).config, 1, "cpu")
    return build(config, World(rank=0, size=1, device=torch.device("cpu"), store=HashStore()), shards)


def trained(run: Run) -> dict[str, torch.Tensor]:
    """Train to the configured end; the parameters."""
    while run.progress.step < run.config.train.steps:
        train_step(run, learning_rate(run.progress.step, run.config.train))
    return {name: p.to_local().detach().clone() for name, p in run.model.named_parameters()}


def by_position(run: Run) -> list[float]:
    """Held-out loss in nats of each bucket of positions up to the target length."""
    report = evaluate(run, open_data(run.config.data))
    return [bucket["loss"] for bucket in report["tasks"]["loss"][str(TARGET)]["buckets"]]


def chosen(methods: dict[str, tuple[str, ...]], *, quick: bool) -> list[tuple[str, tuple[str, ...]]]:
    """All methods, or the first two."""
    return list(methods.items())[: 2 if quick else None]


def one_seed(args: Any, folder: Path, seed: int, curves: Curves) -> None:
    """Train at the window, then every method and remap from there."""
    base = settings(args, folder, seed)
    steps, more = (2, 1) if args.quick else (args.steps, args.tuning_steps)
    run = started([*base, f"data.seq_len={WINDOW}", f"train.steps={steps}"])
    weights = trained(run)
    run.close()
    longer = [*base, f"data.seq_len={TARGET}", f"train.steps={more}", "train.lr=1e-3"]
    for name, keys in chosen(METHODS, quick=args.quick):
        run = started([*longer, *keys], weights)
        curves.zero_shot.setdefault(name, []).append(by_position(run))
        trained(run)
        curves.tuned.setdefault(name, []).append(by_position(run))
        run.close()
    for name, keys in chosen(REMAPS, quick=args.quick):
        run = started([*longer, f"data.seq_len={WINDOW}", *keys], weights)
        curves.zero_shot.setdefault(name, []).append(by_position(run))
        run.close()


def figures_of(phase: str, found: dict[str, list[list[float]]]) -> dict[str, harness.Figure]:
    """Loss inside the window, beyond it, and in the last bucket."""
    figures = {}
    for name, seeds in found.items():
        parts = {
            "window": [losses[0] for losses in seeds],
            "beyond": [sum(losses[1:]) / len(losses[1:]) for losses in seeds],
            "last": [losses[-1] for losses in seeds],
        }
        for part, values in parts.items():
            note = f"{len(values)} seeds: {min(values):.3f} to {max(values):.3f}"
            figures[f"{phase}_{name}_{part}"] = harness.Figure(harness.median(values), "nats", note)
    return figures


def draw(path: Path, curves: Curves) -> None:
    """Loss by position for every method, zero-shot and fine-tuned; the median of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    middle = [WINDOW * (i + 0.5) for i in range(FACTOR)]
    for axes, title, found in zip(
        panels, ("zero-shot", "after fine-tuning"), (curves.zero_shot, curves.tuned), strict=True
    ):
        for number, (name, seeds) in enumerate(found.items()):
            losses = [harness.median(list(values)) for values in zip(*seeds, strict=True)]
            style = "--" if name in REMAPS else "-"
            axes.plot(middle, losses, style, color=f"C{number % 10}", marker=".", label=name)
        axes.axvline(WINDOW, color="grey", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("position in tokens")
    panels[0].set_ylabel("held-out loss in nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and report."""
    flags = harness.parser(__doc__)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=240, help="training steps of 8,192 tokens at the window")
    flags.add_argument("--tuning-steps", type=int, default=12, help="steps at the target length")
    flags.add_argument("--cache", type=Path, help="folder of tokenized stores to keep")
    args = flags.parse_args()
    curves = Curves()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + (1 if args.quick else args.seeds)):
            one_seed(args, Path(folder), seed, curves)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.out.with_suffix(".png"), curves)
    figures = figures_of("zero_shot", curves.zero_shot) | figures_of("tuned", curves.tuned)
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
