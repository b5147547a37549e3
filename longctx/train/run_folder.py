"""The run folder: what was run, where, with what, and how it ended."""

import json
import logging
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.schema import Config
from ..files import write_text

RESOLVED = "config.resolved.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class RunFolder:
    """One run's folder; rank 0 writes, every rank logs to `logs/rank_N.log`."""

    def __init__(self, config: Config, *, rank: int, replaces: bool = False) -> None:
        self.path = Path(config.run.dir)
        self._rank = rank
        self._started = time.monotonic()
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self.log = _rank_log(self.path / "logs" / f"rank_{rank}.log")
        if rank == 0 and not replaces:  # a rank that takes another's place goes on with its folder
            self._describe(config)

    def resolved(self, config: Config) -> None:
        """Write config.resolved.yaml; again once the tokenizer has given the vocabulary its size."""
        if self._rank == 0:
            write_text(self.path / RESOLVED, yaml.safe_dump(asdict(config), sort_keys=False))

    def has_steps(self) -> bool:
        """Whether a step has been done here; its line may wait for `metrics.log_every`."""
        path = self.path / EVENTS
        return path.exists() and '"kind": "stepping"' in path.read_text()

    def last_row(self) -> dict[str, Any]:
        """Metrics of the last step that was written; empty if there is none."""
        path = self.path / METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def began(self) -> float:
        """When the run started first, in seconds since the epoch; now, if it has not."""
        path = self.path / EVENTS
        with path.open() as file:
            rows = (json.loads(line) for line in file)
            return next((row["time"] for row in rows if row["kind"] == "start"), time.time())

    def _describe(self, config: Config) -> None:
        self.resolved(config)
        write_text(self.path / "cmd.txt", shlex.join(sys.orig_argv) + "\n")
        write_text(self.path / "env.json", json.dumps(environment(), indent=1))
        (self.path / SUMMARY).unlink(missing_ok=True)

    def event(self, kind: str, **details: Any) -> None:
        """Append an event (start, checkpoint, stop, error...) to events.jsonl and the rank's log."""
        self.log.info("%s %s", kind, details)
        if self._rank == 0:
            row = {"time": time.time(), "kind": kind} | details
            with (self.path / EVENTS).open("a") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self, exit_code: int, **figures: Any) -> None:
        """Write summary.json: how the run ended and its last figures."""
        if self._rank == 0:
            seconds = time.monotonic() - self._started
            summary = {"exit_code": exit_code, "wall_s": round(seconds, 3)} | figures
            write_text(self.path / SUMMARY, json.dumps(summary, indent=1))


def environment() -> dict[str, Any]:
    """Versions and hardware, for somebody who wants to repeat the run."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": devices,
    }


def _rank_log(path: Path) -> logging.Logger:
    log = logging.getLogger(f"longctx.{path.stem}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
