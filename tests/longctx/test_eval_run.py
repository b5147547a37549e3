"""Evaluation of a run: equal in every layout, within its budget, in training and from the command line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_world, overrides, write_corpus

from longctx.build import build
from longctx.config.schema import RemapConfig
from longctx.data.sources import open_data
from longctx.data.tokenizers import load_tokenizer
from longctx.errors import ConfigError, DataError
from longctx.eval.evaluate import check, evaluate, figures, find_scales
from longctx.eval.files import lines, write
from longctx.eval.needle import grid
from longctx.eval.score import IGNORED, Clock, Row, score
from longctx.recovery.members import Fixed
from longctx.train.loop import train

EVAL = (
    "eval.tasks=[loss,original,passkey,cwe]",
    "eval.lengths=[700,900]",
    "eval.depths=2",
    "eval.trials=1",
    "eval.documents=3",
    "model.init_std=0.5",
    "data.held_out=0.3",
)
STRING = ("eval.remap.type=string", "eval.remap.local=60")
LAYOUTS = {
    "one": (1, {}),
    "usp": (4, {"ulysses": 2, "ring": 2}),
    "tp": (2, {"tp": 2}),
    "groups": (4, {"dp_shard": 2, "tp": 2}),
    "stages": (4, {"pp": 2, "dp_shard": 2}),
    "pipe": (2, {"pp": 2}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_corpus(folder / "docs")
    return folder


def made(rank, size, base, name, layout, extra):
    config = make_config(base, name, size=size, layout=layout, extra=(*EVAL, *extra))
    return build(config, make_world(base / name, rank, size))


def on(base, name, function, *args, layout="one", extra=()):
    (base / name).mkdir(exist_ok=True)
    (base / name / "rendezvous").unlink(missing_ok=True)
    size, degrees = LAYOUTS[layout]
    return run_ranks(function, size, base, name, degrees, extra, *args, init=False)


def report_rank(rank, size, base, name, layout, extra):
    run = made(rank, size, base, name, layout, extra)
    report = evaluate(run, open_data(run.config.data))
    run.close()
    del report["seconds"]
    return report


def flat(report, path=()):
    if isinstance(report, dict):
        return {k: v for key, value in report.items() for k, v in flat(value, (*path, key)).items()}
    if isinstance(report, list):
        return {k: v for i, value in enumerate(report) for k, v in flat(value, (*path, i)).items()}
    return {path: report}


@pytest.fixture(scope="module")
def alone(base):
    """Reports of one process by remap."""
    extra = {remap: ("train.dtype=float64", *remap) for remap in ((), STRING)}
    return {remap: flat(on(base, "expected", report_rank, extra=extra[remap])[0]) for remap in extra}


@pytest.mark.parametrize(
    ("layout", "remap"), [("usp", ()), ("groups", ()), ("stages", ()), ("usp", STRING)], ids=str
)
def test_every_layout_gives_the_report_of_one_process(base, alone, layout, remap):
    extra, expected = ("train.dtype=float64", *remap), alone[remap]
    reports = on(base, f"{layout}", report_rank, layout=layout, extra=extra)
    assert all(report == reports[0] for report in reports)
    found = flat(reports[0])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), key


def score_rank(rank, size, base, name, layout, extra):
    run = made(rank, size, base, name, layout, extra)
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(
            ids=torch.randint(256, (n + 1,), generator=generator),
            labels=torch.randint(IGNORED, 3, (n,), generator=generator),
        )
        for n in (1, 37, 300, 64, 5)
    ]
    found = score(run, rows, labels=3, clock=Clock(run, 0.0))
    expected = [by_hand(run, row) for row in rows] if size == 1 else None
    run.close()
    return [(s.loss, s.tokens, s.hits) for s in found], expected


def by_hand(run, row):
    """Loss, tokens and hits by label from the logits of one forward."""
    n = len(row.labels)
    layout = run.layout(torch.tensor([0, n]))
    with torch.no_grad():
        logits = run.model(row.ids[:-1], torch.arange(n), None, layout=layout)
    losses = torch.nn.functional.cross_entropy(logits, row.ids[1:], reduction="none")
    right = logits.argmax(1) == row.ids[1:]
    return [
        torch.stack([x[row.labels == label].double().sum() for label in range(3)])
        for x in (losses, torch.ones(n), right)
    ]


def test_scores_are_cross_entropy_and_argmax_by_label(base):
    found, expected = on(base, "scores", score_rank)[0]
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for other, _ in on(base, "scores-split", score_rank, layout="groups"):
        for ours, theirs in zip(other, found, strict=True):
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


class Answering:
    """A run whose model gives the targets, or never does."""

    def __init__(self, run, *, right):
        self._run, self._right = run, right

    def __getattr__(self, name):
        return getattr(self._run, name)

    def forward(self, batch):
        logits, local, layout = self._run.forward(batch)
        chosen = local.targets if self._right else (local.targets + 1) % logits.shape[1]
        return torch.nn.functional.one_hot(chosen, logits.shape[1]).to(logits.dtype), local, layout


def oracle_rank(rank, size, base, name, layout, extra):
    run, tokenizer = made(rank, size, base, name, layout, extra), load_tokenizer("bytes")
    clock = Clock(run, 0.0)
    lost = grid(Answering(run, right=False), "passkey", tokenizer, length=700, clock=clock)
    won = grid(Answering(run, right=True), "niah_multivalue", tokenizer, length=900, clock=clock)
    run.close()
    return lost, won


def test_a_model_that_knows_scores_all_and_one_that_does_not_none(base):
    lost, won = on(base, "oracle", oracle_rank)[0]
    assert lost["score"] == [0.0] * 2 and won["score"] == [1.0] * 2 == won["answers"]
    assert lost["prompts"] == lost["scored"] == 2 and won["depths"] == [0.0, 1.0]


def budget_rank(rank, size, base, name, layout, extra):
    run = made(rank, size, base, name, layout, extra)
    report = evaluate(run, open_data(run.config.data), budget_s=1e-9)
    folder = write(report, base / name / "report") if rank == 0 else None
    run.close()
    return report, folder, lines(report), figures(report)


def test_what_the_budget_leaves_out_is_named(base):
    for report, folder, words, values in on(base, "budget", budget_rank, layout="usp"):
        assert len(report["left_out"]) == 7 and "passkey at 700 tokens: 2 of 2" in report["left_out"]
        assert report["tasks"]["passkey"]["900"]["score"] == [None] * 2
        assert values.keys() == {"eval_s"} and any("not reached" in line for line in words)
        if folder:
            pictures = {"loss_by_position.png", "passkey.png", "cwe.png"}
            assert {path.name for path in folder.iterdir()} == pictures | {"report.json"}
            assert all((folder / each).read_bytes()[:4] == b"\x89PNG" for each in pictures)


def train_rank(rank, size, base, name, layout, extra):
    config = make_config(base, name, size=size, layout=layout, extra=(*EVAL, *extra))
    return train(config, Fixed(make_world(base / name, rank, size)))


def rows_of(base, name):
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ["tp", "pipe"])
def test_training_evaluates_every_so_many_tokens_and_goes_on_as_if_it_had_not(base, layout):
    names, steps = [f"{layout}-{each}" for each in ("with", "without")], "train.steps=5"
    assert on(base, names[0], train_rank, layout=layout, extra=("eval.every_tokens=4000", steps)) == [0, 0]
    assert on(base, names[1], train_rank, layout=layout, extra=(steps,)) == [0, 0]
    found, plain = (rows_of(base, name) for name in names)
    reached = [row["tokens"] // 4000 for row in found]
    assert ["eval_s" in row for row in found] == [a > b for a, b in zip(reached, [0, *reached], strict=False)]
    assert [row["loss"] for row in found] == [row["loss"] for row in plain]
    evaluated = [row for row in found if "eval_s" in row]
    assert {"eval_loss/loss@700", "eval_score/passkey@900", "eval_perplexity/cwe@900"} <= evaluated[0].keys()
    reports = sorted((base / names[0] / "eval").glob("step-*/report.json"))
    assert [json.loads(path.read_text())["step"] for path in reports] == [row["step"] for row in evaluated]


def refusal_rank(rank, size, base, name, layout, extra, error):  # noqa: PLR0913 -- as `on` calls it
    run = made(rank, size, base, name, layout, extra)
    with pytest.raises(error) as caught:
        check(run, open_data(run.config.data))
    run.close()
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ("eval.lengths=[100]", ConfigError, "choose longer eval.lengths"),
        ("eval.lengths=[1M]", DataError, "too few for eval.lengths=1048576"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(base, extra, error, words):
    assert words in on(base, "refused", refusal_rank, error, extra=(extra,))[0]
    assert on(base, "refused", train_rank, extra=(extra, "eval.every_tokens=1000")) == [2]


def scales_rank(rank, size, base, name, layout, extra):
    run = made(rank, size, base, name, layout, extra)
    opened, own = open_data(run.config.data), run.model.frequencies
    found = find_scales(run, opened, groups=2)
    assert run.model.frequencies is own
    remaps = [replace(run.config.eval.remap, type="dpe", scales=scales) for scales in (found, (1, 1))]
    reports = [evaluate(run, opened, remap=remap) for remap in (*remaps, RemapConfig())]
    run.close()
    return found, [sum(report["tasks"]["passkey"]["900"]["perplexity"]) for report in reports]


def test_the_search_finds_scales_no_worse_than_none(base):
    extra = ("eval.tasks=[passkey]", "eval.lengths=[900]", "data.seq_len=256", "eval.depths=1")
    found, (best, ones, plain) = on(base, "scales", scales_rank, extra=extra)[0]
    assert len(found) == 2 and best <= ones
    assert ones == pytest.approx(plain, rel=1e-5)


def test_the_command_evaluates_a_run_folder(base):
    words = [*overrides(base, "command"), *EVAL, "train.steps=2", "run.processes=1"]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}

    def call(*command):
        line = [sys.executable, "-m", "longctx", *command]
        return subprocess.run(
            line, cwd=base, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    assert call("train", "quickstart", *words).returncode == 0
    done = call("eval", str(base / "command"), "--json", "eval.tasks=[passkey]", "run.processes=1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["step"] == 2 and set(report["tasks"]["passkey"]) == {"700", "900"}
    assert (base / "command" / "eval" / "step-2" / "report.json").is_file()
    assert call("eval", "quickstart", f"run.dir={base / 'nothing'}").returncode == 2
