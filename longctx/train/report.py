"""What a person reads at the start and at the end of a run."""

import shlex
from pathlib import Path
from typing import Any

from parallel.pipeline.schedule import make_schedule
from parallel.pipeline.simulate import simulate

from ..build import Run
from ..config.schema import Config
from ..model.params import num_parameters

_MOST_SIMULATED = 256


def opening(run: Run, resumed_from: Path | str | None, estimate_s: float | None) -> str:
    """A few lines: model, data, layout, and the predicted time."""
    config, degrees = run.config, run.config.parallel
    axes = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp", "ep")
    split = " x ".join(f"{axis} {getattr(degrees, axis)}" for axis in axes if getattr(degrees, axis) != 1)
    total = num_parameters(config.model).total
    steps = config.train.steps - run.progress.step
    lines = [
        f"model    {total / 1e6:,.2f}M parameters, {config.train.dtype}, context {config.data.seq_len:,}",
        f"data     {_sources(config)}: {len(run.store):,} documents, {run.store.num_tokens:,} tokens",
        f"layout   {run.world.size} x {run.world.device.type}: {split or 'one process'}",
        f"steps    {steps} of up to {config.train.global_batch_tokens:,} tokens",
    ]
    if run.pipeline is not None:
        lines.insert(3, f"pipeline {_pipeline(run)}")
    if resumed_from is not None:
        lines.append(f"resumed  step {run.progress.step} from {resumed_from}")
    if estimate_s is not None:
        lines.append(f"estimate about {_words(estimate_s)}")
    return "\n".join(lines)


def _pipeline(run: Run) -> str:
    """Schedule, layers of each stage, and how long ranks wait in the first step if all stages are alike."""
    spec = run.stages.spec
    words = f"{spec.name}, layers {' + '.join(str(len(layers)) for layers in run.stages.layers)}"
    if run.config.step_plan.groups == "adaptive":
        return words
    count = -(-len(run.loader.packs(0)) // run.mesh.num_data_groups)
    share = simulate(make_schedule(spec, min(count, _MOST_SIMULATED))).bubble
    words += f", {count} microbatches: ranks wait {share:.0%} of the time"
    if count * spec.slices < spec.ranks:
        words += f"; fewer than parallel.pp={spec.ranks}: raise train.global_batch_tokens or pipeline.slices"
    return words


def _sources(config: Config) -> str:
    return ", ".join(source.name for source in config.data.sources) or config.data.path


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def box(run: Run, figures: dict[str, Any], *, stopped_by: str | None) -> None:
    """Print what was reached and the command to try next."""
    from rich.console import Console
    from rich.panel import Panel

    folder = run.config.run.dir
    title = f"stopped by {stopped_by} after step {run.progress.step}, saved" if stopped_by else "done"
    Console().print(
        Panel("\n".join(_reached(run, figures) + _next(folder, stopped_by)), title=title, expand=False)
    )


def _reached(run: Run, figures: dict[str, Any]) -> list[str]:
    lines = [f"{run.progress.step} steps, {run.progress.tokens:,} tokens"]
    if "loss" in figures:
        lines.append(f"train loss     {figures['loss']:.4f} nats per token")
    if "held_out_loss" in figures:
        bits = figures["held_out_bits_per_byte"]
        lines.append(
            f"held-out loss  {figures['held_out_loss']:.4f} nats per token, {bits:.3f} bits per byte"
        )
    if "goodput" in figures:
        lines.append(f"goodput        {figures['goodput']:.0%} of {_words(figures['run_s'])} went into steps")
    lines += [f"checkpoint     {figures['checkpoint']}", f"metrics        {run.config.run.dir}/metrics.jsonl"]
    return lines


def _next(folder: str, stopped_by: str | None) -> list[str]:
    resolved = shlex.quote(f"{folder}/config.resolved.yaml")
    if stopped_by:
        return ["", "continue:", f"  longctx train {resolved} run.resume=true"]
    return [
        "",
        "let it go on from a prompt:",
        f"  longctx sample {shlex.quote(folder)} --prompt 'def main('",
        "check that the layout computes what one process computes:",
        f"  longctx verify {resolved}",
    ]
