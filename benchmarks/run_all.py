"""Run every benchmark and check the shape of its result: `make bench` and `make bench-gpu`.

A benchmark that nobody runs rots; with --quick each takes seconds and must still end with one
JSON line of the agreed schema.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _page import write_page

HERE = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"harness.py", "run_all.py"}
REQUIRED = {"benchmark": str, "commit": str, "date": str, "machine": dict, "arguments": dict, "figures": dict}


def scripts(*, gpu: bool) -> list[Path]:
    """The benchmark scripts of the CPU folder or of `gpu/`; names with an underscore are their parts."""
    folder = HERE / "gpu" if gpu else HERE
    found = sorted(folder.glob("*.py"))
    return [path for path in found if path.name not in NOT_BENCHMARKS and not path.name.startswith("_")]


def schema_errors(line: str, script: Path) -> list[str]:
    """What is wrong with a result line; empty when it is as agreed."""
    try:
        result: dict[str, Any] = json.loads(line)
    except ValueError:
        return [f"the last line is not JSON: {line[:80]!r}"]
    errors = [
        f"{key} is missing or not {kind.__name__}"
        for key, kind in REQUIRED.items()
        if not isinstance(result.get(key), kind)
    ]
    if not errors and result["benchmark"] != script.stem:
        errors.append(f"benchmark is {result['benchmark']!r}, not {script.stem!r}")
    for name, figure in result.get("figures", {}).items():
        if not isinstance(figure.get("unit"), str) or not isinstance(figure.get("value"), int | float | None):
            errors.append(f"figure {name} needs a number (or null) and a unit")
        elif figure["value"] is None and not figure.get("note"):
            errors.append(f"figure {name} has no value and no note that says why")
    return errors if result.get("figures") else [*errors, "no figures"]


def run(script: Path, *, quick: bool, gpu: bool) -> list[str]:
    """Run one script; its errors."""
    command = [sys.executable, str(script), "--json", *(["--quick"] if quick else [])]
    if gpu:
        command += ["--out", str(HERE / "results" / gpu_name() / f"{script.stem}.json")]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        return [f"exit {done.returncode} after {seconds:.0f} s: {done.stderr.strip()[-2000:]}"]
    lines = done.stdout.strip().splitlines()
    errors = schema_errors(lines[-1] if lines else "", script)
    print(f"{'FAIL' if errors else 'ok  '} {script.stem:<24} {seconds:6.1f} s", flush=True)
    return errors


def gpu_name() -> str:
    """Folder name of this machine's results."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("make bench-gpu needs a CUDA device; none is visible")
    return torch.cuda.get_device_name(0).lower().replace(" ", "-")


def main() -> int:
    """Run all; the exit status of `make bench`."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true")
    flags.add_argument("--gpu", action="store_true")
    flags.add_argument("--page", action="store_true", help="only rewrite docs/benchmarks.md")
    args = flags.parse_args()
    if args.page:
        write_page(HERE / "results", HERE.parent / "docs" / "benchmarks.md")
        return 0
    failed = {}
    for script in scripts(gpu=args.gpu):
        if errors := run(script, quick=args.quick, gpu=args.gpu):
            failed[script.name] = errors
    for name, errors in failed.items():
        print(f"{name}: " + "; ".join(errors))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
