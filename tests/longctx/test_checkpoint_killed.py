"""SIGKILL at random points of saving: there is always a good checkpoint, and it is whole."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import start
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.tensors.fill import read_tensor

DEADLINE_S = 50.0


def save_forever(rank: int, size: int, base: Path, trial: int) -> None:
    """Resume, then save a model full of the step's number, again and again, in the background or not."""
    config = make_config(base, "run", size=size, layout={"dp_shard": size})
    world = base / f"world-{trial}"
    run = build(config, make_world(world, rank, size))
    checkpoint.resume(run, checkpoint.checkpoints_folder(run))
    saver = checkpoint.Saver(run)
    while True:
        run.progress.step += 1
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(run.progress.step)
        saver.save(background=trial % 2 == 0)


def newest(folder: Path) -> int:
    found = checkpoint.list_checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def kill_once(base: Path, trial: int, chooser: random.Random) -> None:
    folder = base / "run" / "ckpt"
    (base / f"world-{trial}").mkdir()
    before = newest(folder)
    ranks = [start(save_forever, rank, 2, base, trial) for rank in range(2)]
    deadline = time.monotonic() + DEADLINE_S
    while newest(folder) < before + 2 and time.monotonic() < deadline:
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.002)
    time.sleep(chooser.random() * 0.1)
    for rank in chooser.sample(ranks, 2):
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    good = checkpoint.latest_good(folder)
    assert good is not None and newest(folder) >= before + 2
    assert good.name == f"step-{newest(folder):08d}", "what has a name is whole"
    opened = checkpoint.open_checkpoint(good)
    for name in opened.index.tensors:
        if name.startswith("model."):
            assert (read_tensor(opened.index, name) == opened.manifest["step"]).all(), name


def kill(base: Path, times: int) -> None:
    write_corpus(base / "docs")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chooser = random.Random(seed)
    for trial in range(times):
        kill_once(base, trial, chooser)
    assert len(list((base / "run" / "ckpt").glob(".*partial"))) <= 1  # the next save removes it


@pytest.mark.timeout(200)
def test_twelve_kills(tmp_path):
    kill(tmp_path, 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills(tmp_path):
    kill(tmp_path, 50)
