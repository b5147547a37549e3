"""A run that stages trained is evaluated and sampled on any number of processes, also by stages."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.cli.arguments import Arguments
from longctx.cli.eval import _load
from longctx.config.check import resolve
from longctx.data.sources import open_data
from longctx.eval.evaluate import evaluate
from longctx.hf.source import open_source
from longctx.infer.generate import generate
from longctx.infer.loaded import load_model
from longctx.recovery.members import Fixed
from longctx.train.loop import train

SETTINGS = (
    "train.dtype=float64",
    "train.steps=2",
    "model.num_layers=4",
    "model.init_std=0.5",
    "data.held_out=0.3",
    "eval.tasks=[loss,passkey]",
    "eval.lengths=[700]",
    "eval.documents=3",
    "eval.depths=1",
    "eval.trials=1",
)
REMAPS = {
    "off": {},
    "string": {"local": 60},
    "self_extend": {"group": 4},
    "dpe": {"scales": (1, 2, 4)},
    "lm_infinite": {"sinks": 4},
}
LAYOUTS = {
    "one": (1, {}),
    "ulysses": (2, {"ulysses": 2}),
    "stages": (2, {"pp": 2}),
    "stages-tp": (4, {"pp": 2, "tp": 2}),
    "four-stages": (4, {"pp": 4}),
}
PROMPT = list(b"long context")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder of two stages under the V schedule."""
    folder = tmp_path_factory.mktemp("staged")
    write_corpus(folder / "docs")
    (folder / "run").mkdir()
    assert run_ranks(train_rank, 2, folder, init=False) == [0, 0]
    return folder


def train_rank(rank: int, size: int, base) -> int:
    extra = (*SETTINGS, "pipeline.schedule=zb-v", "checkpoint.every=1")
    config = make_config(base, "run", size=size, layout={"pp": 2}, extra=extra)
    return train(config, Fixed(make_world(base / "run", rank, size)))


def report_rank(rank: int, size: int, base, name: str) -> dict:
    """Reports of the run's newest checkpoint in another layout, by remap."""
    config = make_config(base, "run", size=size, layout=LAYOUTS[name][1], extra=SETTINGS)
    run = build(config, make_world(base / name, rank, size))
    checkpoint.resume(run, checkpoint.checkpoints_folder(run))
    assert run.progress.step == 2
    opened = open_data(config.data)
    remaps = {key: replace(config.eval.remap, type=key, **keys) for key, keys in REMAPS.items()}
    found = {key: evaluate(run, opened, remap=remap)["tasks"] for key, remap in remaps.items()}
    run.close()
    return found


@pytest.fixture(scope="module")
def reports(base):
    """Of every rank, by layout, each computed once."""
    found: dict[str, list[dict]] = {}

    def of(name: str) -> list[dict]:
        if name not in found:
            (base / name).mkdir()
            found[name] = run_ranks(report_rank, LAYOUTS[name][0], base, name, init=False)
        return found[name]

    return of


@pytest.mark.parametrize(
    "name",
    ["stages", "stages-tp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ulysses", "four-stages"))],
)
def test_every_layout_gives_one_process_s_report_with_and_without_remaps(reports, name):
    expected = reports("one")[0]
    found = reports(name)
    assert all(each == found[0] for each in found)
    for key in REMAPS:
        ours, theirs = found[0][key], expected[key]
        for bucket, other in zip(
            ours["loss"]["700"]["buckets"], theirs["loss"]["700"]["buckets"], strict=True
        ):
            assert bucket == pytest.approx(other, rel=1e-10), key
        assert ours["passkey"]["700"]["perplexity"] == pytest.approx(
            theirs["passkey"]["700"]["perplexity"], rel=1e-10
        )
    far = [expected[key]["loss"]["700"]["buckets"][-1]["loss"] for key in REMAPS]
    assert len({round(value, 9) for value in far}) == len(REMAPS)  # each remap is another function


def sample_rank(rank: int, size: int, base) -> list[int]:
    loaded = load_model(
        open_source(str(base / "run")), make_world(base / f"say-{size}", rank, size), torch.float64
    )
    tokens = list(generate(loaded, PROMPT, max_new=3))
    loaded.close()
    return tokens


def likeliest_rank(rank: int, size: int, base) -> list[int]:
    """The same by whole forwards of the run's own model, without a cache."""
    config = make_config(base, "run", size=size, extra=SETTINGS)
    run = build(config, make_world(base / "likeliest", rank, size))
    checkpoint.resume(run, checkpoint.checkpoints_folder(run))
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(3):
            layout = run.layout(torch.tensor([0, len(ids)]))
            logits = run.model(torch.tensor(ids), torch.arange(len(ids)), None, layout=layout)
            ids.append(int(logits[-1].argmax()))
    run.close()
    return ids[len(PROMPT) :]


def test_what_stages_trained_says_the_same_on_one_two_and_four_processes(base):
    for name in ("likeliest", "say-1", "say-2", "say-4"):
        (base / name).mkdir()
    expected = run_ranks(likeliest_rank, 1, base, init=False)[0]
    for size in (1, 2, 4):
        assert run_ranks(sample_rank, size, base, init=False) == [expected] * size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_folder_is_evaluated_with_degrees_for_this_machine(base, size):
    def resolved(*overrides: str):
        found = _load(Arguments(files=(str(base / "run"),), overrides=overrides, options=None))
        return resolve(found.config, size, "cpu")

    config = resolved(f"run.processes={size}")
    degrees = config.parallel
    assert degrees.pp == 1 and degrees.dp_shard * degrees.ring * degrees.ulysses == size
    assert config.model.num_layers == 4 and config.train.dtype == "float64"
    if size > 1:
        assert resolved("parallel.pp=2").parallel.pp == 2
