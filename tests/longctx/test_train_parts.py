"""The loop's pure and local parts: schedule, metric table, sinks, stop request, run folder."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config.schema import Config, RunConfig, TrainConfig
from longctx.train.goodput import Goodput
from longctx.train.metrics import FAMILIES, METRICS, check_names
from longctx.train.run_folder import RunFolder
from longctx.train.schedule import learning_rate
from longctx.train.sinks import JsonlSink, TerminalSink
from longctx.train.stop import StopRequest


def row(step: int, **extra) -> dict:
    base = {"step": step, "tokens": step * 10, "loss": 1.0, "step_time_s": 0.5, "useful_tokens_per_s": 20.0}
    return base | extra


def test_warmup_rises_linearly_to_the_peak():
    config = TrainConfig(steps=100, warmup_steps=4, lr=1.0, schedule="constant")
    assert [learning_rate(s, config) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_ends_at_the_floor_and_is_halfway_in_the_middle():
    config = TrainConfig(steps=101, warmup_steps=1, lr=1.0, min_lr_ratio=0.1, schedule="cosine")
    assert learning_rate(100, config) == pytest.approx(0.1)
    assert learning_rate(50, config) == pytest.approx(0.55)


def test_wsd_is_flat_then_falls_to_the_floor():
    config = TrainConfig(
        steps=100, warmup_steps=0, lr=2.0, min_lr_ratio=0.0, schedule="wsd", decay_fraction=0.1
    )
    assert learning_rate(50, config) == 2.0
    assert learning_rate(94, config) == pytest.approx(1.0)
    assert learning_rate(99, config) == 0.0


def test_schedules_never_leave_their_bounds():
    for schedule in ("cosine", "wsd", "constant"):
        config = TrainConfig(steps=37, warmup_steps=5, lr=3e-4, schedule=schedule)
        rates = [learning_rate(s, config) for s in range(40)]
        assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)


def test_table_has_the_promised_names_and_refuses_others():
    promised = "step tokens loss grad_norm lr step_time_s useful_tokens_per_s padded_tokens_per_s mfu"
    promised += " peak_memory_gib data_wait_s plan_groups plan_predicted_ms"
    assert set(promised.split()) <= METRICS.keys()
    check_names(["step", "loss"])
    with pytest.raises(KeyError, match="lossy"):
        check_names(["loss", "lossy"])


def test_jsonl_sink_refuses_unknown_names_and_writes_whole_lines(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=0)
    sink.write(row(1))
    with pytest.raises(KeyError):
        sink.write(row(2, surprise=1))
    sink.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [row(1)]


def test_jsonl_sink_drops_rows_after_the_resumed_step_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(s)) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    sink = JsonlSink(path, resumed_step=2)
    sink.write(row(3, loss=0.5))
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_terminal_sink_prints_plain_lines_without_a_terminal(capsys):
    sink = TerminalSink(steps=3, done=0)
    for step in (1, 2, 3):
        sink.write(row(step, mfu=0.25))
    sink.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step     1/3  loss 1.0000  20 tokens/s  mfu 25%")
    assert lines[0].endswith("0:01 left")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_stop_request_remembers_the_signal_and_restores_the_handler(name):
    before = signal.getsignal(getattr(signal, name))
    stop = StopRequest()
    try:
        assert not stop.asked
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.asked and stop.name == name
    finally:
        stop.restore()
    assert signal.getsignal(getattr(signal, name)) == before


def test_run_folder_describes_the_run_and_its_end(tmp_path):
    config = replace(Config(), run=RunConfig(dir=str(tmp_path / "run")))
    folder = RunFolder(config, rank=0)
    folder.event("start", step=0)
    folder.finish(0, loss=1.5)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.resolved.yaml", "cmd.txt", "env.json", "events.jsonl", "summary.json", "logs"} <= names
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit_code"] == 0 and summary["loss"] == 1.5 and math.isfinite(summary["wall_s"])


def test_goodput_counts_a_step_once_and_goes_on_in_the_next_process(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    folder = RunFolder(replace(Config(), run=RunConfig(dir=str(tmp_path))), rank=0)
    folder.event("start", step=0)
    goodput = Goodput(folder)
    now[0] = 1010.0
    assert goodput.after(1, 4.0) == {"goodput": 0.4, "run_s": 10.0}
    now[0] = 1020.0
    assert goodput.after(1, 4.0)["goodput"] == 0.2  # computed again
    row = {"step": 2} | goodput.after(2, 4.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    now[0] = 1040.0
    assert Goodput(folder).after(3, 2.0) == {"goodput": 0.25, "run_s": 40.0}


def test_other_ranks_write_only_their_log(tmp_path):
    config = replace(Config(), run=RunConfig(dir=str(tmp_path)))
    folder = RunFolder(config, rank=3)
    folder.event("start", step=0)
    folder.finish(0)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]
    assert "start" in (tmp_path / "logs" / "rank_3.log").read_text()


def test_the_page_lists_every_metric_with_its_unit():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for metric in METRICS.values():
        assert f"| `{metric.name}` | {metric.unit or 'count'} | {metric.reduction} |" in page
    for name, metric in FAMILIES.items():
        assert f"| `{name}/" in page and metric.meaning in page
