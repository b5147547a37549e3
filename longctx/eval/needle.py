"""Grids of depth and length: how often a model finds what lies there, and how sure it is of it."""

import math
from collections.abc import Sequence
from typing import Any

from ..build import Run
from ..data.tokenizers import Tokenizer
from .prompts import Encoded, fit
from .ruler import WITHOUT_DEPTH, make
from .score import Clock, Sums, score

Grid = dict[str, Any]


def depths_of(name: str, count: int) -> list[float]:
    """Depths of a task's needles: 0 the start, 1 the end; None of them where nothing lies anywhere."""
    if name in WITHOUT_DEPTH:
        return [0.0]
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def prompts_of(
    name: str, tokenizer: Tokenizer, *, length: int, depths: Sequence[float], trials: int, seed: int
) -> list[Encoded]:
    """Prompts of one task and length, depth by depth.

    Args:
        name: one of `ruler.GENERATORS`.
        tokenizer: of the model.
        length: tokens of a prompt with its answers, at most.
        depths: where the needle lies.
        trials: prompts for each depth.
        seed: of the needles and the noise.
    """
    return [
        fit(make(name, seed=f"{seed}/{name}/{length}/{depth}/{trial}", depth=depth), tokenizer, length)
        for depth in depths
        for trial in range(trials)
    ]


def grid(run: Run, name: str, tokenizer: Tokenizer, *, length: int, clock: Clock) -> Grid:
    """One task at one length; every rank calls it together.

    Returns:
        By depth: `score`, the share of prompts whose answers greedy decoding gives exactly;
        `answers`, the share of single answers; `perplexity` of the answers' tokens. None where time ran
        out before the depth's first prompt.
    """
    section = run.config.eval
    depths = depths_of(name, section.depths)
    prompts = prompts_of(
        name, tokenizer, length=length, depths=depths, trials=section.trials, seed=section.seed
    )
    labels = max(len(each.prompt.answers) for each in prompts)
    found = score(run, [each.row for each in prompts], labels=labels, clock=clock)
    cells = [found[i : i + section.trials] for i in range(0, len(found), section.trials)]
    rows = [_cell([sums for sums in cell if sums is not None]) for cell in cells]
    return {
        "depths": depths,
        "prompts": len(prompts),
        "scored": sum(sums is not None for sums in found),
        "tokens": max(each.num_tokens for each in prompts),
        **{key: [row and row[key] for row in rows] for key in ("score", "answers", "perplexity")},
    }


def _cell(found: list[Sums]) -> dict[str, float] | None:
    """What the prompts of one depth have in common; an answer counts if all its tokens are right."""
    if not found:
        return None
    right = [[bool(hit == n) for hit, n in zip(s.hits, s.tokens, strict=True) if n] for s in found]
    answers = [each for row in right for each in row]
    loss = sum(float(sums.loss.sum()) for sums in found) / sum(float(sums.tokens.sum()) for sums in found)
    return {
        "score": sum(map(all, right)) / len(right),
        "answers": sum(answers) / len(answers),
        "perplexity": math.exp(min(loss, 700.0)),
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the cells that were reached."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
