"""The page of results: every committed JSON file below benchmarks/results/ as a table."""

import json
import os
from pathlib import Path
from typing import Any

import harness

HEAD = """# Measured

Written by `python benchmarks/run_all.py --page` from the JSON files in `benchmarks/results/`,
never by hand. One section per result, with the machine and the commit that it was measured on.
Each script says in its first lines what it measures and against whom; peers are measured in the
same run, in turns.
"""


def write_page(results: Path, page: Path) -> None:
    """Rewrite the page from the result files."""
    sections = [
        section(json.loads(path.read_text()), path.parent.name) + picture(path, page)
        for path in sorted(results.rglob("*.json"))
    ]
    page.write_text("\n".join([HEAD, *sections]))


def picture(path: Path, page: Path) -> str:
    """A link to the drawing beside a result file, if it has one."""
    drawn = [path.with_suffix(kind) for kind in (".png", ".svg") if path.with_suffix(kind).exists()]
    return "".join(f"\n![{each.stem}]({os.path.relpath(each, page.parent)})\n" for each in drawn)


def section(result: dict[str, Any], folder: str) -> str:
    """One result as a heading, a line about the machine and a table."""
    lines = [
        f"## {result['benchmark']} ({folder})",
        "",
        f"{harness.machine_words(result['machine'])}; commit `{result['commit']}`, {result['date']}.",
        "",
        "| figure | value | |",
        "|---|---|---|",
    ]
    for name, figure in result["figures"].items():
        lines.append(f"| {name} | {value_words(figure)} | {figure.get('note', '')} |")
    return "\n".join(lines) + "\n"


def value_words(figure: dict[str, Any]) -> str:
    """A value with four digits and its unit."""
    if figure["value"] is None:
        return "not measured"
    unit = "" if figure["unit"] in ("count", "ratio") else f" {figure['unit']}"
    return f"{figure['value']:,.4g}{unit}"
