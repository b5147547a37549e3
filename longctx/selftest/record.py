"""Results of a self-test kept in a file, so that one that was interrupted goes on where it stopped."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .cells import Cell
from .result import Result

RESULTS = "results.jsonl"


class Record:
    """The results of one commit below a folder; one line per cell, the last line possibly cut off."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.path = folder / RESULTS
        self.commit = commit

    def load(self) -> dict[str, Result]:
        """Results by the cell's name; none where the file does not exist or holds another commit's."""
        found: dict[str, Result] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by the end of the process that wrote it
            if row.pop("commit") == self.commit:
                chosen = row.pop("cell")
                cell = Cell(**{**chosen, "degrees": tuple(chosen["degrees"])})
                found[cell.name] = Result(cell=cell, **row)
        return found

    def add(self, result: Result) -> None:
        """Append a result."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result) | {"commit": self.commit}) + "\n")


def summary(
    results: Sequence[Result], refused: dict[str, str], *, where: str, commit: str
) -> dict[str, object]:
    """What `longctx doctor --selftest --json` prints."""
    bad = [{"cell": r.cell.name, "error": r.error, "tensor": r.tensor} for r in results if not r.good]
    return {
        "machine": where,
        "commit": commit,
        "cells": len(results),
        "equal": len(results) - len(bad),
        "bad": bad,
        "refused": refused,
    }
