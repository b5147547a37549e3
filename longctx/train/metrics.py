"""The one table of metrics: name, unit, how ranks combine, and the panel that shows it.

Every sink refuses a name that is not here, so a plot, a file and a test can rely on the table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["equal", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """Key in metrics.jsonl and in every other sink."""
    unit: str
    """Unit of the value; empty for a count."""
    reduction: Reduction = "equal"
    """`equal`: already the same on all ranks; `max`: the largest over ranks."""
    panel: str
    """Section of a dashboard."""
    meaning: str
    """What it says, in one line."""


def _metric(panel: str, name: str, unit: str, meaning: str, reduction: Reduction = "equal") -> Metric:
    return Metric(name=name, unit=unit, reduction=reduction, panel=panel, meaning=meaning)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric("train", "step", "", "optimizer steps done"),
        _metric("train", "tokens", "", "trained tokens since the start; the x axis of every plot"),
        _metric("train", "loss", "nats", "mean loss of the step's trained tokens"),
        _metric("train", "grad_norm", "", "global 2-norm of the gradient before clipping"),
        _metric("train", "lr", "", "learning rate of the step"),
        _metric("train", "documents", "", "document pieces in the step"),
        _metric("eval", "held_out_loss", "nats", "mean loss of held-out tokens"),
        _metric("eval", "held_out_bits_per_byte", "bits", "held-out loss per byte of text"),
        _metric("eval", "eval_s", "s", "wall time of the evaluation by position (eval.every_tokens)", "max"),
        _metric("perf", "step_time_s", "s", "wall time of the step, data wait included", "max"),
        _metric("perf", "useful_tokens_per_s", "1/s", "trained tokens per second, all ranks together"),
        _metric("perf", "padded_tokens_per_s", "1/s", "tokens computed per second, masked ones included"),
        _metric("perf", "mfu", "", "causal model FLOP/s without recompute / peak FLOP/s (docs/metrics.md)"),
        _metric("perf", "data_wait_s", "s", "time the step waited for its batch", "max"),
        _metric("perf", "goodput", "", "seconds of steps that stayed / run_s; recoveries lower it"),
        _metric("perf", "run_s", "s", "wall time since the run's first start, queues and restarts included"),
        _metric("mem", "peak_memory_gib", "GiB", "CUDA: peak allocated; CPU: peak resident set", "max"),
        _metric("seq", "max_document_tokens", "", "longest piece of the step"),
        _metric("seq", "plan_groups", "", "sequence groups per microbatch, where a step plan is used"),
        _metric("seq", "plan_predicted_ms", "ms", "step time that the plan predicted"),
    )
}


FAMILIES: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric("mix", "loss_source", "nats", "mean loss of the step's tokens of one source"),
        _metric("mix", "tokens_source", "", "trained tokens of the step of one source"),
        _metric("mix", "loss_length", "nats", "mean loss of the step's tokens in pieces of one length"),
        _metric("mix", "tokens_length", "", "trained tokens of the step in pieces of one length"),
        _metric("eval", "eval_loss", "nats", "mean held-out loss of texts of one length"),
        _metric("eval", "eval_score", "", "share of a task's prompts whose answers greedy decoding gives"),
        _metric("eval", "eval_perplexity", "", "perplexity of the tokens of a task's answers"),
    )
}
"""Metrics that come once per source, length or task: `loss_source/NAME`, `eval_score/TASK@TOKENS`."""


def metric_of(name: str) -> Metric:
    """The row that describes a name: its own, or that of its family.

    Raises:
        KeyError: there is none.
    """
    family, slash, _ = name.partition("/")
    return FAMILIES[family] if slash else METRICS[name]


def check_names(names: Iterable[str]) -> None:
    """Refuse names that the table lacks.

    Raises:
        KeyError: names the unknown metrics.
    """
    unknown = sorted(n for n in names if n not in METRICS and not ("/" in n and n.split("/")[0] in FAMILIES))
    if unknown:
        raise KeyError(f"metrics {unknown} are not in longctx.train.metrics.METRICS; add a row there first")
