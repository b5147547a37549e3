"""`longctx verify`: agreement is found, and a planted wrong gradient is named with its rank."""

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx.train import verify as verify_module
from longctx.train.verify import verify


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    write_corpus(folder / "docs")
    return folder


def verify_rank(rank: int, size: int, base, name: str, layout: dict, planted: str) -> tuple[int, str]:
    import contextlib
    import io

    config = make_config(base, name, size=size, layout=layout)
    if planted:
        plant(planted, size)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = verify(config, make_world(base / name, rank, size))
    return code, out.getvalue()


def plant(name: str, size: int) -> None:
    """Make the layout's gradient of one parameter wrong on rank 1 only."""
    right = verify_module.backward

    def wrong(run, microbatches):
        sums = right(run, microbatches)
        if run.world.size == size and run.world.rank == 1:
            gradient = dict(run.model.named_parameters())[name].grad.to_local()
            gradient[0] += 0.01 * gradient.abs().max()
        return sums

    verify_module.backward = wrong


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}], ids=["ulysses2", "ring2"])
def test_equal_layouts_exit_0_and_say_so(base, layout):
    name = "-".join(layout)
    (base / name).mkdir()
    results = run_ranks(verify_rank, 2, base, name, layout, "", init=False)
    assert [code for code, _ in results] == [0, 0]
    assert "equal: the layout computes what one process computes" in results[0][1]
    assert results[1][1] == ""


def test_a_planted_wrong_gradient_is_named_with_stage_and_rank(base):
    (base / "planted").mkdir()
    name = "layers.1.attention.wk.weight"
    results = run_ranks(verify_rank, 2, base, "planted", {"ulysses": 2}, name, init=False)
    assert [code for code, _ in results] == [1, 1]
    assert f"DIFFERS: gradient of {name}, stage 0, rank 1" in results[0][1]
    assert "1 tensors differ" in results[0][1]


def test_layers_are_reduced_until_one_process_fits(base, monkeypatch, capsys):
    config = make_config(base, "reduced", size=2, layout={"ring": 2})
    (base / "reduced").mkdir()
    world = make_world(base / "reduced", 0, 2)
    monkeypatch.setattr(verify_module, "_memory_bytes", lambda device: 1)
    reduced = verify_module._reduced(config, world)
    assert reduced.model.num_layers == 1
    assert "holds 1 of the 2 layers" in capsys.readouterr().out
    assert torch.get_num_threads() >= 1
