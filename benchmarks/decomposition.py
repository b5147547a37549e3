"""Decomposed documents with a curriculum against concat-and-chunk, end to end on CPU.

Both arms train the quickstart's model on the Python standard library's source, with the same tokens per step,
steps, learning rates and held-out documents, one seed after the other, in turns:

- concat: training documents joined with their end-of-document tokens in a seeded order and cut into rows
  of the longest length; attention crosses documents, as concat-and-chunk does;
- decomposed: power-of-two pieces, `curriculum.kind=grow-p2` in two cycles, one length per step.

Apple's three ratios are stated apart, each concat / decomposed: data efficiency (tokens to the worse of the
two final held-out losses), step cost (counted causal FLOPs, and seconds), and time to target (seconds to
that loss). Seconds are the processor's, on one thread, so that other work on the machine falls on neither
arm. Bands are the smallest and largest of the seeds; the curves are drawn beside the result file.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import harness
import numpy as np
import torch
from torch.distributed import HashStore

from longctx.build import Run, World, build
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.data.loader import StepLoader
from longctx.data.packing import Pieces, StepPacks
from longctx.data.sources import open_data
from longctx.data.store import RECORD, Store
from longctx.data.writer import Documents, write_store
from longctx.train.schedule import learning_rate
from longctx.train.step import evaluate, train_step
from longctx.train.throughput import step_flops

ARMS = ("concat", "decomposed")


@dataclass(kw_only=True)
class Curve:
    """One run: what had been spent at each evaluation, and the held-out loss there."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    flops: float = 0.0

    def reached(self, target: float, spent: list) -> float | None:
        """What was spent when the loss first fell to the target, linear between evaluations."""
        for i, loss in enumerate(self.loss):
            if loss <= target:
                if i == 0:
                    return float(spent[0])
                part = (self.loss[i - 1] - target) / (self.loss[i - 1] - loss)
                return float(spent[i - 1] + part * (spent[i] - spent[i - 1]))
        return None


def settings(args, folder: Path) -> list[str]:
    """Overrides that both arms share."""
    seq_len, steps = (512, 4) if args.quick else (args.seq_len, args.steps)
    return [
        f"data.cache_dir={args.cache or folder / 'cache'}",
        "data.held_out=0.05",
        "data.workers=1",
        "data.min_len=256",
        f"data.seq_len={seq_len}",
        f"train.microbatch_tokens={seq_len}",
        f"train.global_batch_tokens={2 * seq_len}",
        f"train.steps={steps}",
        f"train.warmup_steps={max(1, steps // 10)}",
        f"train.eval_tokens={1024 if args.quick else 32768}",
        "curriculum.kind=grow-p2",
        "curriculum.mode=one_bucket",
        "curriculum.cycles=2",
        *(["model.num_layers=1", "model.hidden_size=32"] if args.quick else []),
    ]


def rows_store(run: Run, folder: Path, seed: int) -> tuple[Store, Pieces]:
    """Joined training documents as rows of the longest length and one token more, the last target."""
    seq_len = run.config.data.seq_len
    documents = open_data(run.config.data).train_docs
    order = np.random.default_rng(seed).permutation(documents)
    joined = np.concatenate([np.asarray(run.store.document(int(d))) for d in order])
    rows = (len(joined) - 1) // seq_len
    tokens = np.concatenate([joined[i * seq_len : (i + 1) * seq_len + 1] for i in range(rows)])
    lengths = np.full(rows, seq_len + 1, dtype=np.int64)
    part = Documents(tokens=tokens.astype(np.int64), lengths=lengths, records=np.zeros(rows, dtype=RECORD))
    tokenizer = {"name": "bytes", "fingerprint": "bytes-1", "vocab_size": 257, "eos_id": 256}
    meta = {"tokenizer": tokenizer, "num_skipped": 0, "skipped": []}
    write_store(str(folder / f"rows-{seed}"), [part], vocab_size=257, files=["-"], meta=lambda: meta)
    zeros = np.zeros(rows, dtype=np.int64)
    pieces = Pieces(doc=np.arange(rows), start=zeros, length=lengths - 1)
    return Store(str(folder / f"rows-{seed}")), pieces


def use_rows(run: Run, folder: Path, seed: int) -> None:
    """Give the run concat-and-chunk's batches in the place of its own."""
    store, pieces = rows_store(run, folder, seed)
    run.loader.close()
    run.store, tokens = store, run.config.train.global_batch_tokens
    packs = StepPacks(
        pieces,
        seed=seed,
        microbatch_tokens=run.config.data.seq_len,
        packs_per_step=tokens // run.config.data.seq_len,
    )
    run.loader = StepLoader(store, packs)
    run.config = replace(run.config, curriculum=replace(run.config.curriculum, kind="none"))


def train(arm: str, seed: int, args, folder: Path) -> Curve:
    """One run; evaluations are not part of its seconds."""
    loaded = load(["recipes/quickstart.yaml"], [*settings(args, folder), f"run.seed={seed}"])
    config = resolve(loaded.config, 1, "cpu")
    run = build(config, World(rank=0, size=1, device=torch.device("cpu"), store=HashStore()))
    if arm == "concat":
        use_rows(run, folder, seed)
    curve, seconds = Curve(), 0.0
    every = max(1, config.train.steps // 16)
    try:
        while run.progress.step < config.train.steps:
            started = time.process_time()
            train_step(run, learning_rate(run.progress.step, config.train))
            seconds += time.process_time() - started
            curve.flops += step_flops(run, run.progress.step - 1)
            if run.progress.step % every == 0 or run.progress.step == config.train.steps:
                curve.tokens.append(run.progress.tokens)
                curve.seconds.append(seconds)
                curve.loss.append(evaluate(run)["held_out_loss"])
    finally:
        run.close()
    return curve


def band(values: list[float], unit: str, what: str) -> harness.Figure:
    """Median, with the seeds' range as the note."""
    return harness.Figure(
        harness.median(values), unit, f"{what}; {len(values)} seeds: {min(values):.3g} to {max(values):.3g}"
    )


def ratios(curves: dict[str, list[Curve]]) -> dict[str, harness.Figure]:
    """Apple's ratios, seed by seed."""
    figures = {
        f"held_out_loss_{arm}": band([c.loss[-1] for c in curves[arm]], "nats", "after the last step")
        for arm in ARMS
    }
    pairs = list(zip(curves["concat"], curves["decomposed"], strict=True))
    figures["step_flops_ratio"] = band(
        [c.flops / d.flops for c, d in pairs], "ratio", "concat / decomposed, counted"
    )
    figures["step_seconds_ratio"] = band(
        [c.seconds[-1] / d.seconds[-1] for c, d in pairs], "ratio", "concat / decomposed, whole run"
    )
    for name, unit in (("data_efficiency", "tokens"), ("time_to_target", "seconds")):
        # The target is the worse of the two final losses, which both runs reach.
        found = []
        for c, d in pairs:
            target = max(c.loss[-1], d.loss[-1])
            found.append(c.reached(target, getattr(c, unit)) / d.reached(target, getattr(d, unit)))
        note = f"{unit} to the worse of the two final losses, concat / decomposed"
        figures[name] = band(found, "ratio", note)
    return figures


def draw(path: Path, curves: dict[str, list[Curve]]) -> None:
    """Held-out loss against tokens and against seconds: the median of the seeds in their band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (spent, unit) in zip(
        panels, (("tokens", "tokens"), ("seconds", "processor seconds")), strict=True
    ):
        for number, arm in enumerate(ARMS):
            x = np.median([getattr(c, spent) for c in curves[arm]], axis=0)
            losses = np.array([c.loss for c in curves[arm]])
            axes.plot(x, np.median(losses, axis=0), color=f"C{number}", marker=".", label=arm)
            axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=f"C{number}", alpha=0.2)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("held-out loss in nats")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and report."""
    flags = harness.parser(__doc__)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=96)
    flags.add_argument("--seq-len", type=int, default=8192)
    flags.add_argument("--cache", type=Path, help="folder of tokenized stores to keep")
    args = flags.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[Curve]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + (1 if args.quick else args.seeds)):
            for arm in ARMS:
                curves[arm].append(train(arm, seed, args, Path(folder)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.out.with_suffix(".png"), curves)
    harness.report(__file__, ratios(curves), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
