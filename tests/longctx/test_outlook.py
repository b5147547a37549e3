"""What `prepare` says of a curriculum before it runs."""

import json

import numpy as np
import pytest
from stores import make_store

from longctx.cli import forecast as forecasting
from longctx.cli.forecast import forecast_text, predict
from longctx.cli.prepare import run
from longctx.config.load import load
from longctx.config.schema import DataConfig
from longctx.data.outlook import outlook, outlook_text, write_plot
from parallel.planner.sequence import SequenceCost

DATA = DataConfig(seq_len=64, min_len=8)


def test_pieces_tokens_and_pairs_of_known_documents():
    found = outlook(np.array([65, 33, 12, 5]), DATA)
    assert dict(zip(found.classes, found.pieces, strict=True)) == {8: 1, 16: 0, 32: 1, 64: 1}
    assert (found.documents, found.reaching, found.tokens, found.kept) == (4, 1, 115, 104)
    pairs = 64 * 65 // 2 + 32 * 33 // 2 + 8 * 9 // 2
    assert found.attention_share == pytest.approx(pairs / (104 * 65 / 2))


def test_the_text_names_losses_savings_and_few_long_documents():
    few = outlook_text(outlook(np.array([9] * 200 + [65]), DATA), "web")
    assert "web: pieces" in few
    assert "warning: 1 of 201 documents (0.50%) reach data.seq_len=64" in few
    assert "of concat-and-chunk at 64 tokens" in few
    assert "warning" not in outlook_text(outlook(np.array([9] * 50 + [65]), DATA), "web")


def test_documents_without_a_piece_have_no_attention_share():
    none = outlook(np.array([5, 8]), DATA)
    assert none.kept == 0 and none.attention_share is None
    text = outlook_text(none, "web")
    assert "no document has a piece; lower data.min_len=8" in text
    assert "attention work" not in text and "100.0% of the tokens are in no piece" in text


@pytest.mark.parametrize("kind", ["natural", "grow-p100", "shrink-linear"])
def test_the_forecast_plans_the_lengths_of_the_whole_run(tmp_path, monkeypatch, kind):
    make_store(tmp_path / "docs", [[*range(128), 256]] * 40 + [[*range(16), 256]] * 320)  # halves: 128, 16
    planned = []
    monkeypatch.setattr(forecasting, "predict", lambda steps, ranks, cost: planned.extend(steps))
    settings = {
        "data.path": tmp_path / "docs",
        "data.held_out": 0.0,
        "data.seq_len": 128,
        "data.min_len": 8,
        "curriculum.kind": kind,
        "curriculum.cycles": 3,
        "train.steps": 100_000,
        "train.global_batch_tokens": 1024,
        "train.microbatch_tokens": 512,
    }
    asked = load(["recipes/quickstart.yaml"], [f"{key}={value}" for key, value in settings.items()])
    forecasting.forecast(asked.config, 4)
    assert all(sum(lengths) == 1024 for lengths in planned)
    long = [lengths.count(128) * 128 / 1024 for lengths in planned]
    assert sum(long) / len(long) == pytest.approx(0.5, abs=0.07)
    if kind == "grow-p100":
        assert long[0] < 0.1 and long[-1] > 0.9


def test_the_plot_is_a_picture_with_a_bar_for_every_class(tmp_path):
    from xml.etree import ElementTree

    lengths = np.array([65, 200, 12])
    path = write_plot(tmp_path / "p.svg", outlook(lengths, DATA), lengths)
    bars = [e for e in ElementTree.parse(path).iter() if e.tag.endswith("rect") and e.get("fill") != "white"]
    assert len(bars) == 2 * 5  # 8, 16, 32, 64 and 128 tokens; documents and pieces


def test_prepare_prints_and_plots_every_source(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        make_store(tmp_path / name, [[*rng.integers(0, 256, size=int(n)), 256] for n in (70, 20, 9, 130)])
    arguments = [
        "recipes/quickstart.yaml",
        f"data.sources=[{{name: a, path: {tmp_path}/a}}, {{name: b, path: {tmp_path}/b}}]",
        "data.seq_len=64",
        "data.min_len=8",
        "train.global_batch_tokens=512",
        "step_plan.capacity_tokens=32",
    ]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "step on 8 data ranks, predicted: adaptive groups" in said
    assert "a: pieces of a curriculum" in said and "b: pieces of a curriculum" in said
    assert (tmp_path / "a.lengths.svg").exists() and (tmp_path / "b.lengths.svg").exists()
    assert run([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sources"]
    assert [set(row["pieces"]) for row in rows] == [{"8", "16", "32", "64"}] * 2


def test_the_forecast_compares_every_degree_that_holds_the_longest_piece():
    cost = SequenceCost(
        alpha1_ms=1e-3,
        alpha2_ms=0.1,
        beta_ms=5.0,
        comm_ms_per_token={1: 0.0, 2: 0.02, 4: 0.04},
        capacity_tokens=64,
    )
    found = predict([[128] + [16] * 24], 4, cost)
    assert set(found.static_ms) == {2, 4}
    assert 0 < found.adaptive_ms <= min(found.static_ms.values())
    assert "best static degree" in forecast_text(found)
