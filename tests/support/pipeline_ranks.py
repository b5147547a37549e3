"""What the pipeline tests run on every rank, and one process to compare with."""

import torch
from compose_ranks import TOLERANCE, name_of, size_of, worst_error
from ranks import run_ranks
from tiny import make_config, make_world

MODEL = ("train.dtype=float64", "model.num_layers=4", "train.microbatch_tokens=512")


def one_step(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]):
    """Loss sum and tokens, this stage's whole gradients, and the norm of all of them."""
    from longctx.build import build
    from longctx.train.step import backward
    from parallel import grads

    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    sums = backward(run, run.loader.step(0)).tolist()
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    norm = float(grads.clip_(run.model.parameters(), 0.0, mesh=run.mesh, replicas=run.replicas))
    counts = dict(run.mesh.counter.calls)
    run.close()
    return sums, found, norm, counts


def run_step(base, layout: dict, extra: tuple[str, ...] = (), *, function=one_step) -> list:
    """`one_step` of a layout on all its ranks."""
    size = size_of(layout)
    name = f"{name_of(layout)}-{abs(hash((tuple(layout.items()), extra))):x}"
    (base / name).mkdir(exist_ok=True)
    return run_ranks(function, size, base, name, layout, (*MODEL, *extra), init=False)


def assert_equal(results: list, expected, dtype: str = "float64") -> None:
    """Every rank's loss and norm, and every gradient of every rank, are those of one process."""
    sums, gradients, norm, _ = expected
    tolerance = TOLERANCE[dtype]
    seen = set()
    for found_sums, found, found_norm, _ in results:
        assert found_sums[1] == sums[1]
        assert abs(found_sums[0] - sums[0]) <= tolerance * abs(sums[0])
        assert abs(found_norm - norm) <= tolerance * norm
        own = {key: gradients[key] for key in found}
        whole = torch.stack([g.abs().max() for g in gradients.values()]).median()
        error, name = worst_error(found, own, floor=1e-3 * float(whole))
        assert error <= tolerance, f"{name}: {error:.2e}"
        seen |= found.keys()
    assert seen == gradients.keys()


def swapped_reference(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]):
    """`one_step` on one process; odd microbatches go through layers 1, 0, ..., n-1, n-2.

    A data group counts its own microbatches: with `GROUPS=n` in `extra` it has every n-th one.
    """
    groups = next((int(e.split("=")[1]) for e in extra if e.startswith("GROUPS=")), 1)
    extra = tuple(e for e in extra if not e.startswith("GROUPS="))
    from longctx.build import build
    from longctx.model.parts import Parts
    from longctx.train.losses import Losses
    from parallel import fsdp, grads

    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    losses = Losses(run)
    batches = run.loader.step(0)
    for number, batch in enumerate(batches):
        order = list(range(config.model.num_layers))
        if number // groups % 2:
            order[:2], order[-2:] = order[1::-1], order[:-3:-1]
        fsdp.set_gradient_sync(run.model, number == len(batches) - 1)
        whole = run.layout(batch.cu_seqlens)
        local = batch.take(whole.token_index)
        parts = Parts(embed=True, layers=tuple(order), head=True)
        logits = run.model(local.input_ids, local.position_ids, local.rope_id, layout=whole, parts=parts)
        losses.add(logits, local, batch, whole).backward()
    sums = grads.normalize_(run.model.parameters(), mesh=run.mesh, sums=losses.sums).tolist()
    found = {key: p.grad.full_tensor() for key, p in run.model.named_parameters()}
    norm = float(grads.clip_(run.model.parameters(), 0.0, mesh=run.mesh))
    run.close()
    return sums, found, norm, {}
