"""Every kind of fault in every phase and layout gives the undisturbed run, bit for bit.

In turn t the fault of number k strikes in phase number k + t. Where each layout has a turn of its own, every
pair of kind and phase, kind and layout, phase and layout occurs: that is the cover in `make test`.
`make test-all` runs every turn of every layout and writes the table in docs/recovery.md.
"""

import json
import re
import time
from pathlib import Path

import pytest
from rehearsal import (
    LAYOUTS,
    ROOT,
    SIZE,
    assert_survivors_stayed,
    events,
    left_over,
    reference,
    rehearse,
    rows,
    state,
)
from tiny import write_corpus

from longctx.cli.selftest import commit, machine

KINDS = ("kill", "exception", "exit", "drop", "stop", "hang")
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "keep")
TURNS = [
    pytest.param(layout, turn, marks=[] if turn == number else pytest.mark.slow)
    for number, layout in enumerate(LAYOUTS)
    for turn in range(len(PHASES))
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Holds the corpus, an undisturbed run of each layout, the cells of the table, and what it measures."""
    base = tmp_path_factory.mktemp("matrix")
    (base / "measured").write_text(f"Commit {commit()}, {time.strftime('%Y-%m-%d')}, {machine()}.")
    write_corpus(base / "docs")
    (base / "cells").mkdir()
    return base


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("layout", "turn"), TURNS)
def test_every_fault_gives_the_undisturbed_run(home, layout, turn):
    expected = home / f"{layout}-reference"
    if not expected.exists():
        reference(home, layout)
    strikes = strikes_of(layout, turn)
    code, words, folder = rehearse(home, layout, strikes, name=f"{layout}-{turn}", timeout=170)
    assert code == 0, words
    struck = [json.loads(path.read_text()) for path in (folder / "chaos").glob("struck-*.json")]
    assert len(struck) == len(strikes), words
    assert rows(folder) == rows(expected)
    assert state(folder) == state(expected)
    assert events(folder, "mismatch") == []
    assert_goodput_counts_every_step_once(folder)
    found = events(folder, "recovered")
    assert found and not any("checkpoint" in event for event in found)
    assert max(event["steps_redone"] for event in found) <= 3
    assert_survivors_stayed(folder)
    assert left_over(folder) == []
    for fault in struck:
        again = min(event["time"] for event in found if event["time"] >= fault["time"])
        cell = home / "cells" / f"{layout}.{fault['kind']}.{fault['phase']}"
        cell.write_text(f"{again - fault['time']:.1f}")


def strikes_of(layout: str, turn: int) -> list[str]:
    number = list(LAYOUTS).index(layout)
    pairs = [(kind, PHASES[(k + turn) % len(PHASES)]) for k, kind in enumerate(KINDS)]
    faults = [f"{3 + 4 * k}:{(k + number) % SIZE}:{phase}:{kind}" for k, (kind, phase) in enumerate(pairs)]
    replicated = "hsdp" not in layout  # twins are the copies there: nothing is sent
    return [*faults, f"29:{number % SIZE}:{'replicate' if replicated else 'reduce'}"]


def assert_goodput_counts_every_step_once(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    useful = sum(line["step_time_s"] for line in lines)
    assert lines[-1]["goodput"] * lines[-1]["run_s"] == pytest.approx(useful)


@pytest.mark.slow
def test_the_whole_matrix_is_written_to_its_page(home):
    lines = [f"| kind, phase | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for kind in KINDS:
        for phase in PHASES:
            cells = [home / "cells" / f"{layout}.{kind}.{phase}" for layout in LAYOUTS]
            lines.append(f"| {kind}, {phase} | {' | '.join(cell.read_text() for cell in cells)} |")
    write_table(ROOT / "docs" / "recovery.md", (home / "measured").read_text(), "\n".join(lines))


def write_table(page: Path, measured: str, table: str) -> None:
    """Replace the page's table of kinds and phases and the line above it, which says what was measured."""
    words = f"{measured}\n\n{table}\n"
    pattern = r"(?m)^Commit .*\n\n\| kind, phase \|.*\n(?:\|.*\n)*"
    text, count = re.subn(pattern, lambda _: words, page.read_text())
    assert count == 1, f"{page} has {count} tables that begin with 'kind, phase'"
    page.write_text(text)
