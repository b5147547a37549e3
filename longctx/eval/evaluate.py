"""The tasks of section `eval` on a built run, as one report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..build import Run
from ..config.eval import remap_window
from ..config.schema import RemapConfig
from ..data.sources import Opened
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..errors import ConfigError
from ..rope.remap import Remapped, make_passes, search_scales
from ..rope.tables import Frequencies
from .needle import grid, mean, prompts_of
from .perplexity import bucket_edges, by_bucket, position_rows, take_texts
from .score import Clock, score, scored

Report = dict[str, Any]
LOSSES = ("loss", "original")
"""Tasks that score held-out text; all others score the answers to prompts."""


def evaluate(run: Run, opened: Opened, *, budget_s: float = 0.0, remap: RemapConfig | None = None) -> Report:
    """Every configured task at every length; every rank calls it together and gets the same report.

    Args:
        run: its model as it stands.
        opened: the run's data.
        budget_s: seconds after which what is left is left out; 0: no limit.
        remap: of relative positions; None: `eval.remap`.

    Returns:
        `tasks` by name and length in tokens (as text, for JSON), `left_out` in words, `seconds`.

    Raises:
        ConfigError: a task needs a tokenizer that the data do not name, or a length is too short for it.
        DataError: the held-out documents are shorter than a length.
    """
    section, clock = run.config.eval, Clock(run, budget_s)
    remap = remap or section.remap
    tokenizer = _tokenizer(opened)
    tasks: Report = {}
    with remapped(run, remap):
        for name in section.tasks:
            lengths = [original_length(run)] if name == "original" else lengths_of(run)
            for length in lengths:
                found = _task(run, name, opened, tokenizer, length=length, clock=clock)
                tasks.setdefault(name, {})[str(length)] = found
    return {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "remap": remap.type,
        "tasks": tasks,
        "left_out": left_out(tasks),
        "seconds": round(clock.seconds(), 3),
    }


def check(run: Run, opened: Opened) -> None:
    """Refuse now what `evaluate` would refuse hours later; raises what it raises."""
    tokenizer = _tokenizer(opened)
    for name in run.config.eval.tasks:
        if name in LOSSES:
            longest = original_length(run) if name == "original" else max(lengths_of(run))
            take_texts(opened.tokens, opened.held_out_docs, length=longest, count=1)
        else:
            shortest = min(lengths_of(run))
            prompts_of(name, _needed(tokenizer, name), length=shortest, depths=[0.0], trials=1, seed=0)


def lengths_of(run: Run) -> tuple[int, ...]:
    """`eval.lengths`, or the training length."""
    return run.config.eval.lengths or (run.config.data.seq_len,)


def original_length(run: Run) -> int:
    """The length that the model had before its extension."""
    return run.config.model.rope.original_len or run.config.data.seq_len


def _task(
    run: Run, name: str, opened: Opened, tokenizer: Tokenizer | None, *, length: int, clock: Clock
) -> Report:
    if name in LOSSES:
        return loss_by_position(run, opened, length=length, clock=clock)
    return grid(run, name, _needed(tokenizer, name), length=length, clock=clock)


def loss_by_position(run: Run, opened: Opened, *, length: int, clock: Clock) -> Report:
    """Mean held-out loss in nats, over all and by buckets of positions."""
    section = run.config.eval
    texts = take_texts(opened.tokens, opened.held_out_docs, length=length, count=section.documents)
    edges = bucket_edges(length, section.buckets)
    rows = [
        row
        for text in texts.rows
        for row in position_rows(text, edges, window=section.window, stride=section.stride)
    ]
    found = scored(score(run, rows, labels=len(edges) - 1, clock=clock))
    buckets = by_bucket(found, edges)
    tokens = sum(each["tokens"] for each in buckets)
    total = sum(each["loss"] * each["tokens"] for each in buckets)
    return {
        "loss": total / tokens if tokens else None,
        "tokens": int(tokens),
        "buckets": buckets,
        "texts": len(texts.rows),
        "joined": texts.joined,
        "prompts": len(rows),
        "scored": len(found),
    }


def left_out(tasks: Report) -> list[str]:
    """What the budget did not allow for, in words."""
    return [
        f"{name} at {length} tokens: {found['prompts'] - found['scored']} of {found['prompts']}"
        for name, lengths in tasks.items()
        for length, found in lengths.items()
        if found["scored"] < found["prompts"]
    ]


def figures(report: Report) -> dict[str, float]:
    """The report as metrics: `eval_loss/LENGTH`, `eval_score/TASK@LENGTH`, `eval_perplexity/TASK@LENGTH`."""
    found: dict[str, float | None] = {"eval_s": report["seconds"]}
    for name, lengths in report["tasks"].items():
        for length, task in lengths.items():
            if name in LOSSES:
                found[f"eval_loss/{name}@{length}"] = task["loss"]
            else:
                found[f"eval_score/{name}@{length}"] = mean(task["score"])
                found[f"eval_perplexity/{name}@{length}"] = mean(task["perplexity"])
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def remapped(run: Run, remap: RemapConfig) -> Iterator[None]:
    """Remapped positions in place of the model's, until the block ends."""
    own = run.model.frequencies
    if remap.type == "off" or not isinstance(own, Frequencies):
        yield
        return
    passes = make_passes(remap, window=remap_window(run.config, remap), pairs=own.inv_freq.shape[1])
    run.model.frequencies = Remapped(frequencies=own, passes=passes)
    try:
        yield
    finally:
        run.model.frequencies = own


def find_scales(run: Run, opened: Opened, *, groups: int) -> tuple[int, ...]:
    """DPE's scales for this model: those with which it is surest of needles at `eval.lengths`.

    Source: DPE (2025), sec. 3.1.
    """
    tokenizer = _needed(_tokenizer(opened), "passkey")
    clock = Clock(run, 0.0)

    def perplexity(scales: tuple[int, ...]) -> float:
        with remapped(run, replace(run.config.eval.remap, type="dpe", scales=scales)):
            grids = [grid(run, "passkey", tokenizer, length=n, clock=clock) for n in lengths_of(run)]
        return float(sum(value for found in grids for value in found["perplexity"]))

    return search_scales(perplexity, groups=groups)


def _needed(tokenizer: Tokenizer | None, task: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(
            f"task {task} needs a tokenizer, but data.path is a store that does not name one; set "
            f"data.tokenizer, or eval.tasks=[{','.join(LOSSES)}]"
        )
    return tokenizer


def _tokenizer(opened: Opened) -> Tokenizer | None:
    return None if opened.tokenizer is None else load_tokenizer(opened.tokenizer)
