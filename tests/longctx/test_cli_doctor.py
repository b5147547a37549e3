"""`longctx doctor`: the machine as JSON, the self-test end to end, and a fault that it must find."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
from ranks import run_ranks
from tiny import make_world

from longctx.cli.doctor import run
from longctx.cli.selftest import conclude
from longctx.selftest.cells import Cell, write_corpus
from longctx.selftest.record import RESULTS, Record
from longctx.selftest.result import Result
from longctx.selftest.run import run_cells

TP2 = (1, 1, 1, 1, 1, 2)
SHARD2 = (1, 1, 2, 1, 1, 1)


def test_the_machine_in_words_and_as_json(capsys):
    assert run(["--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"python", "torch", "cpu", "devices", "nccl", "gloo"} <= found.keys()
    assert found["host"]["problems"] == [] and found["host"]["shm_bytes"] > 0
    assert run([]) == 0
    text = capsys.readouterr().out
    assert f"torch        {found['torch']}" in text
    assert f"nccl         {found['nccl']}" in text


def faulty_rank(rank: int, size: int, folder, cells: list[Cell]):
    """Forget to add up what tp ranks know of a norm's gradient."""
    from parallel import grads

    grads._sum_whole_over_tp = lambda parameters, mesh: None
    return list(run_cells(cells, folder, make_world(folder, rank, size)))


def test_a_fault_is_found_and_the_first_bad_cell_named(tmp_path, capsys):
    write_corpus(tmp_path / "docs")
    cells = [Cell(degrees=SHARD2, dtype="float32"), Cell(degrees=TP2, dtype="float32")]
    results = run_ranks(faulty_rank, 2, tmp_path, cells, init=False)[0]
    assert [r.good for r in results] == [True, False]
    page = tmp_path / "parity.md"
    assert conclude(Namespace(write=page, json=True, folder=tmp_path), results) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["bad"][0]["cell"] == cells[1].name
    status = json.loads((tmp_path / "status.json").read_text())
    assert f"self-test: {cells[1].name}" in status["error"] and "norm" in status["error"]
    assert "DIFFERS" in page.read_text() and cells[1].name in page.read_text()


def test_a_record_keeps_one_commits_results_and_bears_a_cut_line(tmp_path):
    good = Result(
        cell=Cell(degrees=TP2, reshard=2), error=1e-12, tensor="loss", steps_error=0.0, tolerance=1e-10
    )
    Record(tmp_path, "old").add(
        Result(cell=Cell(degrees=SHARD2), error=1, tensor="x", steps_error=0, tolerance=0)
    )
    Record(tmp_path, "new").add(good)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"cell": {"degr')
    assert Record(tmp_path, "new").load() == {good.cell.name: good}


@pytest.mark.timeout(120)
def test_the_selftest_runs_from_the_command_line_and_continues(tmp_path):
    folder, page = tmp_path / "work", tmp_path / "parity.md"
    words = [
        "doctor",
        "--selftest",
        "--quick",
        "--processes=1",
        "--json",
        f"--folder={folder}",
        f"--write={page}",
    ]
    for attempt in (1, 2):
        command = [sys.executable, "-m", "longctx", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert found["cells"] == found["equal"] > 0 and not found["bad"]
        assert "ring x strategy ulysses" in found["refused"]
        assert ("\nequal  " in done.stdout) == (attempt == 1)  # all cells are known the second time
    assert "## Refused" in page.read_text()
