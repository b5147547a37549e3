"""What every benchmark shares: flags, the one JSON line, and measuring in turns."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number."""

    value: float | None
    """The number; None where it cannot be measured here, with `note` saying why."""
    unit: str
    """s, ms, MiB, tokens/s, ratio, bytes, count..."""
    note: str = ""
    """What it compares, or why it is missing."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has; the description is the script's docstring."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--json", action="store_true", help="print one JSON line, last")
    flags.add_argument("--quick", action="store_true", help="smallest sizes, to see that it still runs")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, help="also write the JSON to this file")
    return flags


def in_turns(
    candidates: Mapping[str, Callable[[], None]], *, rounds: int, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each candidate, measured A B C A B C, so that noise falls on all alike.

    The first round warms up and is not counted, unless everything has run before (`warm`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warm, rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """Median."""
    return statistics.median(values)


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def report(script: str, figures: Mapping[str, Figure], args: argparse.Namespace) -> None:
    """Print the table or the JSON line, and write the file if asked to."""
    name = Path(script).stem
    result = {
        "benchmark": name,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "figures": {key: _plain(figure) for key, figure in figures.items()},
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    width = max(map(len, figures), default=0)
    print(f"{name}  ({machine_words(result['machine'])}, commit {result['commit']})")
    for key, figure in figures.items():
        value = "not measured" if figure.value is None else f"{figure.value:,.4g} {figure.unit}"
        print(f"  {key:<{width}}  {value:<18} {figure.note}")


def machine() -> dict[str, Any]:
    """The hardware and versions a figure belongs to."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_words(found: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    gpus = f", {len(found['gpus'])} x {found['gpus'][0]}" if found["gpus"] else ""
    return f"{found['cores']} cores {found['cpu']}, {found['memory_gib']} GiB{gpus}, torch {found['torch']}"


def _plain(figure: Figure) -> dict[str, Any]:
    plain: dict[str, Any] = {"value": figure.value, "unit": figure.unit}
    return plain | ({"note": figure.note} if figure.note else {})


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
