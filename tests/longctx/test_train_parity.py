"""The same recipe in every layout: losses, held-out losses and gradients of one process."""

import json

import pytest
import torch
from ranks import run_ranks
from tiny import LAYOUTS, make_config, make_world, write_corpus

from longctx.build import build
from longctx.recovery.members import Fixed
from longctx.train.loop import train
from longctx.train.step import backward

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    write_corpus(folder / "docs")
    return folder


def train_rank(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> int:
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    return train(config, Fixed(make_world(base / name, rank, size)))


def rows_of(base, name: str) -> list[dict]:
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def run_layout(base, layout: str, *extra: str) -> list[dict]:
    size, degrees = LAYOUTS[layout]
    name = f"{layout}-{'-'.join(e.split('=')[-1] for e in extra)}"
    (base / name).mkdir()
    assert run_ranks(train_rank, size, base, name, degrees, extra, init=False) == [0] * size
    return rows_of(base, name)


@pytest.mark.parametrize("dtype,steps", [("float32", 6), ("float64", 6)])
def test_losses_of_every_layout_equal_one_process(base, dtype, steps):
    extra = (f"train.dtype={dtype}", f"train.steps={steps}")
    expected = run_layout(base, "one", *extra)
    assert len(expected) == steps
    assert expected[-1]["loss"] < expected[0]["loss"]
    for layout in list(LAYOUTS)[1:]:
        found = run_layout(base, layout, *extra)
        for key in ("loss", "held_out_loss", "grad_norm"):
            want = [r[key] for r in expected if key in r]
            assert [r[key] for r in found if key in r] == pytest.approx(want, rel=TOLERANCE[dtype]), layout
        assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]


def gradients(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]):
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    backward(run, run.loader.step(0))
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    run.close()
    return found


def gradients_in(base, layout: str, dtype: str) -> dict[str, torch.Tensor]:
    size, degrees = LAYOUTS[layout]
    folder = f"gradients-{layout}-{dtype}"
    (base / folder).mkdir()
    return run_ranks(gradients, size, base, folder, degrees, (f"train.dtype={dtype}",), init=False)[0]


@pytest.fixture(scope="module")
def expected(base):
    """What one process computes, in both types."""
    return {dtype: gradients_in(base, "one", dtype) for dtype in TOLERANCE}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_gradient_of_every_layout_equals_one_process(base, expected, layout, dtype):
    found, wanted = gradients_in(base, layout, dtype), expected[dtype]
    floor = 1e-3 * torch.stack([g.abs().max() for g in wanted.values()]).median()
    assert found.keys() == wanted.keys()
    for key, want in wanted.items():
        scale = max(want.abs().max(), floor)
        error = (found[key] - want).abs().max() / scale
        assert error <= TOLERANCE[dtype], f"{key}: {error:.2e}"


def build_twice(rank: int, size: int, base) -> list[float]:
    config = make_config(base, "twice", size=size, layout={"ulysses": size})
    losses = []
    for epoch in range(2):
        run = build(config, make_world(base / "twice", rank, size, epoch=epoch))
        losses.append(float(backward(run, run.loader.step(0))[0]))
        run.close()
    return losses


def test_build_may_run_again_in_one_process(base):
    (base / "twice").mkdir()
    first, second = run_ranks(build_twice, 2, base, init=False)
    assert first[0] == first[1] == second[0] == second[1]


def adopt(rank: int, size: int, base) -> bool:
    config = make_config(base, "adopt", size=size, layout={"ring": size})
    run = build(config, make_world(base / "adopt", rank, size))
    shards = {name: p.to_local().detach() + 1 for name, p in run.model.named_parameters()}
    run.close()
    again = build(config, make_world(base / "adopt", rank, size, epoch=1), shards=shards)
    same = all(torch.equal(p.to_local(), shards[name]) for name, p in again.model.named_parameters())
    again.close()
    return same


def test_given_shards_are_adopted(base):
    (base / "adopt").mkdir()
    assert run_ranks(adopt, 2, base, init=False) == [True, True]
