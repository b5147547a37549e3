"""How often a run saves where a stop leaves too little time for a step and a save."""

import json

import pytest
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx.config.schema import CheckpointConfig
from longctx.train.saves import interval


@pytest.mark.parametrize(
    ("grace_s", "background", "steps"),
    [
        (0, True, 0),  # nothing is known
        (100, True, 0),  # 1.5 times 42 s fit
        (60, True, 40),  # 2 x 40 s of saving at 2 s a step
        (60, False, 400),  # the steps wait: a twentieth of the time
    ],
)
def test_saves_that_do_not_fit_the_grace_time_are_made_all_the_time(grace_s, background, steps):
    config = CheckpointConfig(grace_s=grace_s, background=background)
    assert interval(config, step_s=2.0, save_s=40.0) == steps


def test_a_step_longer_than_its_save_is_followed_by_one():
    assert interval(CheckpointConfig(grace_s=1), step_s=90.0, save_s=1.0) == 1


def train_rank(rank, size, base, name, extra):
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    config = make_config(base, name, size=size, layout={"dp_shard": size}, extra=extra)
    (base / name).mkdir(exist_ok=True)
    return train(config, Fixed(make_world(base / name, rank, size)))


def test_a_run_that_could_not_save_in_time_has_always_saved(tmp_path):
    write_corpus(tmp_path / "docs")
    extra = ("checkpoint.grace_s=1e-6", "train.steps=12", "train.eval_every=0")
    assert run_ranks(train_rank, 2, tmp_path, "run", extra, init=False) == [0, 0]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    pace = next(event for event in events if event["kind"] == "pace")
    saves = [event for event in events if event["kind"] == "checkpoint"]
    steps = [event["step"] for event in saves]
    assert steps[0] == 1 and steps[-1] == 12 and len(steps) > 2 and pace["every"] >= 1
    assert saves[-1]["save_s"] > 0


@pytest.mark.parametrize("groups", ["static", "adaptive"])
def test_a_run_whose_data_ends_saves_the_steps_that_it_has_done(tmp_path, groups):
    write_corpus(tmp_path / "docs")

    def run(epochs, *extra):
        sources = f"data.sources=[{{name: only, path: {tmp_path}/docs, max_epochs: {epochs}}}]"
        asked = ("curriculum.kind=natural", f"step_plan.groups={groups}", "train.eval_every=0", sources)
        (tmp_path / "run" / "rendezvous").unlink(missing_ok=True)
        codes = run_ranks(train_rank, 2, tmp_path, "run", (*asked, *extra), init=False)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return codes, [json.loads(line)["step"] for line in lines]

    codes, steps = run(1, "train.steps=40")
    assert codes == [2, 2]
    done, tokens = len(steps), sum(len(path.read_bytes()) for path in (tmp_path / "docs").iterdir())
    assert 0 < done <= tokens // 2048 < 8
    error = json.loads((tmp_path / "run" / "summary.json").read_text())["error"]
    assert f"step {done + 1}: what data.sources may still give" in error
    assert error.endswith(f"step-{done:08d}")
    assert [path.name for path in (tmp_path / "run" / "ckpt").glob("step-*")] == [f"step-{done:08d}"]
    assert run(0, "train.steps=8", "run.resume=true") == ([0, 0], list(range(1, 9)))
