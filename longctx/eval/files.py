"""A report as files: JSON and pictures, and as lines for a terminal."""

import json
from pathlib import Path
from typing import Any

from ..files import write_text
from .needle import mean
from .plots import draw

Report = dict[str, Any]


def write(report: Report, folder: Path) -> Path:
    """Write `report.json` and its pictures; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    draw(report, folder)
    return folder


def lines(report: Report) -> list[str]:
    """The report in words, one line for each task and length."""
    found = [f"step {report['step']}, {report['tokens']:,} tokens trained, remap {report['remap']}"]
    for name, lengths in report["tasks"].items():
        for length, task in lengths.items():
            found.append(f"{name:<16} {int(length):>9,} tokens  {_words(name, task)}")
    found += [f"left out: {each}" for each in report["left_out"]]
    return [*found, f"{report['seconds']:.1f} s"]


def _words(name: str, task: Report) -> str:
    if not task["scored"]:
        return "not reached"
    if name in ("loss", "original"):
        ends = (task["buckets"][0], task["buckets"][-1])
        first, last = (f"{each['loss']:.3f} at {each['from']:,} to {each['to']:,}" for each in ends)
        joined = f"; {task['joined']} of {task['texts']} texts are joined documents" if task["joined"] else ""
        return f"loss {task['loss']:.3f} nats; {first}, {last}{joined}"
    by_depth = " ".join("  -" if each is None else f"{each:4.0%}" for each in task["score"])
    return f"exact {mean(task['score']):.0%}, perplexity {mean(task['perplexity']):.2f}; by depth {by_depth}"
