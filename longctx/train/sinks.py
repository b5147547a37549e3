"""Where metrics go: metrics.jsonl (the truth), the terminal, Weights & Biases."""

import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from ..config.schema import MetricsConfig
from .metrics import METRICS, check_names, metric_of

Row = dict[str, Any]

RECENT = 4096
"""Rows that are remembered, to compare with those of steps that are computed again."""
COMPUTED = ("tokens", "loss", "grad_norm", "lr", "held_out_loss", "held_out_bits_per_byte")
"""What a step computes, and so must compute again; the rest is measured."""


class Sink(Protocol):
    """Takes one row of metrics per logged step."""

    def write(self, row: Row) -> None:
        """Take the row."""

    def forget(self, step: int) -> None:
        """What follows a step is undone; it comes again with other numbers."""

    def close(self) -> None:
        """Flush and release."""


class JsonlSink:
    """One JSON object per line and step.

    A line is the word that the step is done. After a recovery steps are computed again; their lines
    stand, and a row that says something else about them is told as `mismatch`. On resume from a
    checkpoint, and where a loss spike undoes steps for good, rows after that step are dropped.
    """

    def __init__(
        self, path: Path, *, resumed_step: int | None, mismatch: Callable[[Row, Row], None] | None = None
    ) -> None:
        """Open.

        Args:
            path: of the file.
            resumed_step: step after which rows are dropped; None: all whole lines stay.
            mismatch: called with the row that stands and the one that was computed again.
        """
        self._path, self._mismatch = path, mismatch
        self._open(resumed_step)

    def _open(self, last_step: int | None) -> None:
        self._written = {row["step"]: row for row in _keep_until(self._path, last_step)[-RECENT:]}
        self._file = self._path.open("a")

    def write(self, row: Row) -> None:
        """Append the row, readable at once by a reader of the file; a step's first row stands."""
        check_names(row)
        before = self._written.get(row["step"])
        if before is None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._written[row["step"]] = row
            self._written.pop(row["step"] - RECENT, None)
        elif self._mismatch is not None and any(before.get(name) != row.get(name) for name in COMPUTED):
            self._mismatch(before, row)

    def forget(self, step: int) -> None:
        """Drop the rows after a step."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _keep_until(path: Path, step: int | None) -> list[Row]:
    """Rows up to a step, the last ones parsed; the others and a line that a kill has cut are removed."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    rows: list[Row] = [json.loads(line) for line in lines]
    kept = [i for i, row in enumerate(rows) if step is None or row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines[i] + "\n" for i in kept))
    os.replace(partial, path)
    return [rows[i] for i in kept]


class TerminalSink:
    """A live progress line on a terminal; plain lines, at most one per 5 percent, elsewhere."""

    def __init__(self, *, steps: int, done: int) -> None:
        self._steps = steps
        self._every = max(1, steps // 20)
        self._seconds: list[float] = []
        self._progress = _live_progress(steps, done) if sys.stdout.isatty() else None

    def write(self, row: Row) -> None:
        """Show the row."""
        check_names(row)
        self._seconds = [*self._seconds[-19:], row["step_time_s"]]
        text = _line(row)
        if self._progress is not None:
            bar, task = self._progress
            bar.update(task, completed=row["step"], text=text)
        elif row["step"] % self._every == 0 or row["step"] == self._steps or "held_out_loss" in row:
            left = (self._steps - row["step"]) * sum(self._seconds) / len(self._seconds)
            print(f"step {row['step']:>5}/{self._steps}  {text}  {_clock(left)} left", flush=True)

    def forget(self, step: int) -> None:
        """What was shown was shown."""

    def close(self) -> None:
        """End the live line."""
        if self._progress is not None:
            self._progress[0].stop()


def _line(row: Row) -> str:
    parts = [f"loss {row['loss']:.4f}", f"{row['useful_tokens_per_s']:,.0f} tokens/s"]
    if row.get("mfu") is not None:
        parts.append(f"mfu {row['mfu']:.0%}")
    if "held_out_loss" in row:
        parts.append(f"held-out {row['held_out_loss']:.4f}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _live_progress(steps: int, done: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    bar.start()
    return bar, bar.add_task("train", total=steps, completed=done, text="")


class WandbSink:
    """Weights & Biases; the run id lives in the run folder so that a resumed run is the same run."""

    def __init__(self, config: MetricsConfig, folder: Path, resolved: dict[str, Any]) -> None:
        import wandb

        mode: Literal["online", "offline"] = "online" if config.wandb == "online" else "offline"
        if config.wandb == "auto" and wandb.api.api_key:
            mode = "online"
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=config.project,
            id=identity.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=resolved,
        )
        self._run.define_metric("tokens")
        for metric in METRICS.values():
            self._run.define_metric(f"{metric.panel}/{metric.name}", step_metric="tokens")

    def write(self, row: Row) -> None:
        """Log the row under `panel/name`, against `tokens`."""
        check_names(row)
        named = {f"{metric_of(name).panel}/{name}": value for name, value in row.items()}
        self._run.log(named | {"tokens": row["tokens"]})

    def forget(self, step: int) -> None:
        """What was logged stands; the later points come beside it."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
