"""Where metrics go: metrics.jsonl (the truth), the terminal, Weights & Biases."""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

from ..config.schema import MetricsConfig
from .metrics import METRICS, check_names, metric_of

Row = dict[str, Any]


class Sink(Protocol):
    """Takes one row of metrics per logged step."""

    def write(self, row: Row) -> None:
        """Take the row."""

    def close(self) -> None:
        """Flush and release."""


class JsonlSink:
    """One JSON object per line; on resume, rows after the resumed step are dropped."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        _drop_after(path, resumed_step)
        self._file = path.open("a")

    def write(self, row: Row) -> None:
        """Append the row, readable at once by a reader of the file."""
        check_names(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may cut a line
    kept = [line for line in rows if json.loads(line)["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)


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

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
