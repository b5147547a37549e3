"""The plain PyTorch example trains, and its losses do not depend on the number of processes."""

import importlib.util
from pathlib import Path

import pytest
from ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "sequence_parallel.py"


def losses(rank, size):
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def test_the_example_learns_the_same_on_any_number_of_processes():
    alone = run_ranks(losses, 1)[0]
    assert alone[-1] < alone[0]
    for size in (3, 4):
        for found in run_ranks(losses, size):
            assert found == pytest.approx(alone, rel=1e-5)


def test_the_example_is_short():
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= 45
