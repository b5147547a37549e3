"""What the composition tests run on every rank: one step's gradients, or a few optimizer steps."""

import torch
from ranks import run_ranks
from tiny import make_config, make_world

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def name_of(degrees: dict[str, int]) -> str:
    """`shard2-tp2`, or `one`."""
    return "-".join(f"{axis.removeprefix('dp_')}{n}" for axis, n in degrees.items() if n > 1) or "one"


def size_of(degrees: dict[str, int]) -> int:
    """Processes of a layout."""
    size = 1
    for degree in degrees.values():
        size *= degree
    return size


def one_step(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]):
    """Loss sum, tokens, whole gradients and their norm of the first step."""
    from longctx.build import build
    from longctx.train.step import backward
    from parallel import grads

    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    sums = backward(run, run.loader.step(0)).tolist()
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    norm = float(grads.clip_(run.model.parameters(), 0.0, mesh=run.mesh))
    run.close()
    return sums, found, norm


def run_one_step(base, layout: dict, extra: tuple[str, ...], *, label: str = "") -> list:
    """`one_step` of a layout on all its ranks."""
    size = size_of(layout)
    name = f"{label}{name_of(layout)}-{abs(hash((tuple(layout.items()), extra))):x}"
    (base / name).mkdir()
    return run_ranks(one_step, size, base, name, layout, extra, init=False)


def worst_error(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, floor: float | None = None
) -> tuple[float, str]:
    """Largest error over the gradients, each on its own scale, floored at 1e-3 of the median's."""
    if floor is None:
        floor = 1e-3 * float(torch.stack([g.abs().max() for g in expected.values()]).median())
    assert found.keys() == expected.keys()
    errors = {
        key: float((found[key] - want).abs().max() / max(want.abs().max(), floor))
        for key, want in expected.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    return errors[worst], worst


def assert_equal_to_one(results: list, expected, dtype: str) -> None:
    """Loss, norm and every gradient of every rank's view."""
    sums, gradients, norm = expected
    tolerance = TOLERANCE[dtype]
    for found_sums, found, found_norm in results:
        assert found_sums[1] == sums[1]
        assert abs(found_sums[0] - sums[0]) <= tolerance * abs(sums[0])
        assert abs(found_norm - norm) <= tolerance * norm
        error, name = worst_error(found, gradients)
        assert error <= tolerance, f"{name}: {error:.2e}"
