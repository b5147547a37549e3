"""The parity matrix: a pairwise cover in `make test`, the whole of it in `make test-all`."""

import pytest
from ranks import run_ranks
from tiny import make_world

from longctx.selftest.cells import Cell, compiled, matrix, pairwise, write_corpus
from longctx.selftest.run import run_cells

COVER = sorted(pairwise(8, seed=0, fixed={"compile": False}), key=lambda cell: cell.size)
WHOLE = matrix(8)
CHUNK = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    write_corpus(folder / "docs")
    return folder


def cells_rank(rank: int, size: int, base, name: str, cells: list[Cell]):
    world = make_world(base / name, rank, size)
    return [(r.cell.name, r.good, r.error, r.tensor, r.steps_error) for r in run_cells(cells, base, world)]


def check_cells(base, name: str, cells: list[Cell], timeout: float = 55) -> None:
    (base / name).mkdir()
    size = max(cell.size for cell in cells)
    results = run_ranks(cells_rank, size, base, name, cells, init=False, timeout=timeout)[0]
    assert [r[0] for r in results] == [cell.name for cell in cells]
    wrong = [r for r in results if not r[1]]
    assert not wrong, wrong


@pytest.mark.parametrize("first", range(0, len(COVER), CHUNK))
def test_cover(base, first):
    check_cells(base, f"cover-{first}", COVER[first : first + CHUNK])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(WHOLE), CHUNK))
def test_matrix(base, first):
    check_cells(base, f"matrix-{first}", WHOLE[first : first + CHUNK])


def compiled_rank(rank: int, size: int, base, name: str, cell: Cell):
    """Whether the cell is equal, and the number of graphs that torch made for it."""
    from torch._dynamo.utils import counters

    [result] = run_cells([cell], base, make_world(base / name, rank, size))
    return result.good, result.error, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("cell", compiled(4), ids=lambda cell: cell.name)
def test_compiled_blocks_equal_one_process_and_are_compiled(base, cell):
    name = f"compiled-{'-'.join(map(str, cell.degrees))}"
    (base / name).mkdir()
    for good, error, graphs in run_ranks(compiled_rank, cell.size, base, name, cell, init=False, timeout=270):
        assert good, error
        assert graphs > 0
