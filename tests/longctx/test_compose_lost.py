"""A rank that dies or falls silent in the middle of training: the others end with a named error."""

import os
import time

import pytest
from ranks import RankError, run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.train.step import evaluate, train_step
from parallel.errors import PeerLost

TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    write_corpus(folder / "docs")
    return folder


def phase_of(run, phase: str):
    """What the ranks do together when one of them is lost."""
    return {
        "step": lambda: train_step(run, 1e-4),
        "evaluation": lambda: evaluate(run),
        "checkpoint": lambda: checkpoint.Saver(run).save(),
    }[phase]


def lose_rank(rank: int, size: int, base, name: str, layout: dict, how: tuple[str, str]) -> None:
    """Train; rank 1 dies or sleeps after the first step. The other writes down what it sees."""
    how, phase = how
    config = make_config(base, name, size=size, layout=layout)
    run = build(config, make_world(base / name, rank, size, timeout_s=TIMEOUT_S))
    train_step(run, 1e-4)
    if rank == 1 and how == "dies":
        os._exit(3)
    seen, started = base / name / "seen", time.monotonic()
    if rank == 1:
        while time.monotonic() - started < 3 * TIMEOUT_S and not seen.exists():
            time.sleep(0.1)
        return
    try:
        phase_of(run, phase)()
    except PeerLost as error:
        seen.write_text(f"{time.monotonic() - started} {error}")


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize(
    ("layout", "phase"),
    [
        ({"tp": 2}, "step"),
        ({"dp_shard": 2}, "step"),
        ({"dp_shard": 2}, "evaluation"),
        ({"dp_shard": 2}, "checkpoint"),
    ],
    ids=str,
)
def test_the_others_end_with_a_named_error_within_the_timeout(base, layout, phase, how):
    name = f"{'-'.join(layout)}-{phase}-{how}"
    (base / name).mkdir()
    if how == "dies":
        with pytest.raises(RankError, match="rank 1: ended with exit code 3"):
            run_ranks(lose_rank, 2, base, name, layout, (how, phase), init=False)
    else:
        run_ranks(lose_rank, 2, base, name, layout, (how, phase), init=False)
    seconds, _, error = (base / name / "seen").read_text().partition(" ")
    assert error.startswith("lost a peer on axis")
    assert float(seconds) < 2 * TIMEOUT_S
