"""A checkpoint moves between pipeline stages and whole models without changing a byte."""

import hashlib

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.train.step import train_step

EXTRA = ("model.num_layers=4",)
FIRST, SECOND, THIRD = {"pp": 2}, {"dp_shard": 2}, {"pp": 2}
STATE = ("exp_avg", "exp_avg_sq", "step")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_corpus(folder / "docs")
    return folder


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return hashlib.sha256(whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(run) -> dict[str, str]:
    """Of every parameter that this rank holds, whole, and of its optimizer state."""
    found = {}
    for name, parameter in run.model.named_parameters():
        found[name] = digest(parameter)
        found |= {f"{name}.{key}": digest(run.optimizer.state[parameter][key]) for key in STATE}
    return found


def move(rank: int, size: int, base, *names: str) -> list[dict[str, str]]:
    """Train two steps on stages, then resume and save in each layout; the digests in each."""
    results = []
    before = None
    for name, layout in zip(names, (FIRST, SECOND, THIRD), strict=True):
        (base / f"meet-{name}").mkdir(exist_ok=True)
        config = make_config(base, name, size=size, layout=layout, extra=EXTRA)
        run = build(config, make_world(base / f"meet-{name}", rank, size))
        if before is None:
            train_step(run, 1e-3)
            train_step(run, 1e-3)
        else:
            checkpoint.resume(run, before)
        assert run.progress.step == 2
        checkpoint.save(run)
        before = checkpoint.checkpoints_folder(run)
        results.append(digests(run))
        run.close()
    return results


def test_stages_to_whole_models_and_back_leave_every_tensor_and_moment_as_it_was(base):
    ranks = run_ranks(move, 2, base, "first", "second", "third", init=False)
    stages = {**ranks[0][0], **ranks[1][0]}
    assert ranks[0][0].keys() != ranks[1][0].keys()  # each stage has its own layers
    assert ranks[0][1] == ranks[1][1] == stages
    assert [each[2] for each in ranks] == [each[0] for each in ranks]
    assert len(set(stages.values())) > len(stages) // 2  # not all zeros
