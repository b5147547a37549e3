"""What pipelines refuse by name, what must stay refused, and stages that die."""

import os
import time

import pytest
import torch
from pipeline_ranks import MODEL, assert_equal, one_step, run_step
from ranks import RankError, run_ranks
from tiny import make_config, make_world, write_corpus

from longctx.build import build
from longctx.errors import ConfigError
from longctx.train.step import backward, train_step
from parallel.errors import PeerLost

TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    write_corpus(folder / "docs")
    return folder


@pytest.mark.parametrize(
    "pp,extra,words",
    [
        (4, ("model.num_layers=3",), "parallel.pp=4.*needs at least 4 layers.*set parallel.pp=3"),
        (2, ("pipeline.schedule=zb-v", "model.num_layers=3"), "set parallel.pp=1"),
        (2, ("pipeline.schedule=zb-h1", "parallel.reshard_after_forward=true"), "would be lost"),
        (2, ("pipeline.schedule=zb-v", "train.compile=true"), "set train.compile=false"),
        (2, ("pipeline.schedule=interleaved", "pipeline.slices=2"), "pipeline.slices=2 works with"),
        (2, ("pipeline.slices=2", "attention.strategy=allgather"), "set attention.strategy=usp"),
        (2, ("pipeline.swap_ends=true",), "parallel.pp=2; choose at least 4"),
        (4, ("pipeline.swap_ends=true", "model.num_layers=6"), "equally many layers"),
        (4, ("pipeline.swap_ends=true", "pipeline.speeds=[1,1,1,2]"), "remove pipeline.speeds"),
        (2, ("pipeline.speeds=[1,2,3]",), "a positive relative speed for each of parallel.pp=2"),
        (2, ("pipeline.speeds=[1,nan]",), "a positive relative speed"),
        (1, ("pipeline.speeds=[1,2]",), "does nothing with parallel.pp=1"),
        (2, ("pipeline.slices=2000",), "exceeds train.microbatch_tokens=1024"),
        (2, ("pipeline.speeds=[1,2]", "pipeline.split=equal"), "is for pipeline.split=cost"),
        (1, ("pipeline.slices=4",), "does nothing with parallel.pp=1"),
        (1, ("pipeline.swap_ends=true",), "set parallel.pp to at least 4"),
    ],
)
def test_bad_pipelines_are_refused_before_any_process_group(base, pp, extra, words):
    with pytest.raises(ConfigError, match=words):
        make_config(base, size=pp, layout={"pp": pp}, extra=("model.num_layers=4", *extra))


def reshard_by_force(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> str:
    """A split backward whose parameters are resharded behind the configuration's back."""
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    run = build(config, make_world(base / name, rank, size))
    run.model.set_reshard_after_forward(True)
    run.model.set_reshard_after_backward = lambda value: None
    try:
        backward(run, run.loader.step(0))
    except RuntimeError as error:
        return str(error)
    return "computed"


def test_a_split_backward_on_resharded_parameters_is_an_error_not_a_wrong_gradient(base):
    """Refused in the configuration and, where that is gone round, at the first weight gradient."""
    found = run_step(base, {"pp": 2}, ("pipeline.schedule=zb-h1",), function=reshard_by_force)
    assert any("resharded before its gradient was computed" in words for words in found), found


def count_forwards(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]):
    """`one_step`, and how often each block was computed in each microbatch."""
    from longctx.model.decoder import FeedForward

    calls = [0]
    plain = FeedForward.forward

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        calls[0] += len(x) > 0
        return plain(self, x)

    FeedForward.forward = counted
    try:
        config = make_config(base, name, size=size, layout=layout, extra=extra)
        world = make_world(base / name, rank, size)
        run = build(config, world)
        microbatches = sum(batch.num_tokens > 0 for batch in run.loader.step(0))
        backward(run, run.loader.step(0))
        layers = len(run.model.layers)
        run.close()
    finally:
        FeedForward.forward = plain
    return calls[0], layers * microbatches


def test_recomputed_blocks_are_recomputed_once_in_a_split_backward(base):
    extra = ("pipeline.schedule=zb-h1", "train.recompute=full")
    for calls, needed in run_step(base, {"pp": 2}, extra, function=count_forwards):
        assert calls == 2 * needed


def lose_stage(rank: int, size: int, base, name: str, how: str) -> None:
    """Train; stage 1 of 4 dies or sleeps in its second step. The others write down what they see."""
    config = make_config(base, name, size=size, layout={"pp": size}, extra=MODEL)
    run = build(config, make_world(base / name, rank, size, timeout_s=TIMEOUT_S))
    train_step(run, 1e-4)
    if rank == 1 and how == "dies":
        time.sleep(0.5)  # the others wait for it in the middle of a transfer
        os._exit(3)
    if rank == 1:
        time.sleep(3 * TIMEOUT_S)
        return
    started = time.monotonic()
    try:
        train_step(run, 1e-4)
    except PeerLost as error:
        note = base / name / f"note-{rank}"  # renamed when whole: this rank may be ended any time now
        note.write_text(f"{time.monotonic() - started} {error.rank} {error}")
        note.replace(base / name / f"seen-{rank}")
    time.sleep(max(0.0, 1.5 * TIMEOUT_S + started - time.monotonic()))


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_lost_stage_is_named_and_nobody_waits_beyond_the_timeout(base, how):
    (base / how).mkdir()
    if how == "dies":
        with pytest.raises(RankError, match="rank 1: ended with exit code 3"):
            run_ranks(lose_stage, 4, base, how, how, init=False)
    else:
        run_ranks(lose_stage, 4, base, how, how, init=False)
    seen = {int(path.name[5:]): path.read_text() for path in (base / how).glob("seen-*")}
    touching = seen[0] if 0 in seen else seen[2]
    assert "lost rank 1 on axis 'pp'" in touching
    assert all(float(text.split()[0]) < 2 * TIMEOUT_S for text in seen.values())


def test_fewer_microbatches_than_stages_work(base):
    extra = ("train.global_batch_tokens=512",)
    assert_equal(run_step(base, {"pp": 2}, extra), run_step(base, {}, extra, function=one_step)[0])
