"""Which devices and how many processes a run takes on this machine, and how a worker reports its end."""

import json

import pytest

from longctx.cli import machine, worker
from longctx.cli.machine import choose_local, pinned, select
from longctx.config.load import load
from longctx.config.schema import Config
from longctx.errors import ConfigError, DataError

GIB = 1024**3


def config(*overrides):
    return load([], overrides).config


@pytest.mark.parametrize(
    ("gpus", "overrides", "device", "processes"),
    [
        ([], [], "cpu", 2),
        ([], ["run.processes=1"], "cpu", 1),
        ([80 * GIB] * 8, [], "cuda", 8),
        ([80 * GIB] * 8, ["run.processes=2"], "cuda", 2),
        ([80 * GIB] * 8, ["run.device=cpu"], "cpu", 2),
        ([None], [], "cuda", 1),
    ],
)
def test_all_gpus_or_two_cpu_processes(gpus, overrides, device, processes):
    local = choose_local(config(*overrides), gpus)
    assert (local.device, local.processes) == (device, processes)


def test_more_processes_than_gpus_is_refused():
    with pytest.raises(ConfigError, match=r"run\.processes=3 exceeds the 2 visible GPUs"):
        choose_local(config("run.processes=3"), [None, None])
    with pytest.raises(ConfigError, match=r"run\.device=cpu"):
        choose_local(config("run.device=cuda"), [])


def test_the_smallest_gpu_sets_the_memory():
    local = choose_local(Config(), [80 * GIB, None, 40 * GIB])
    assert local.gpu_bytes == 40 * GIB
    found, overrides = pinned(Config(), local)
    assert found.run.device_memory == 40 * GIB
    assert overrides == ["run.device=cuda", f"run.device_memory={40 * GIB}"]
    assert load([], overrides).config == found


def test_what_the_user_set_is_not_told_twice():
    asked = config("run.device=cuda", "run.device_memory=10GiB")
    assert pinned(asked, choose_local(asked, [80 * GIB])) == (asked, [])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [1, 2, 3]),
        ("", []),
        ("0", [1]),
        ("2,0", [3, 1]),
        ("1,7,0", [2]),
        ("-1", []),
        ("GPU-abc,MIG-1", [1, 1]),
    ],
)
def test_visible_devices(asked, expected):
    environ = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    assert select([1, 2, 3], environ) == expected


def test_without_nvidia_smi_there_are_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_QUERY", [str(tmp_path / "nvidia-smi")])
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "absent")
    assert machine.installed_gpus() == []


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_QUERY", ["printf", r"81559\n[N/A]\n"])
    assert machine.installed_gpus() == [81559 * 1024**2, None]


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """Run the end of a worker's life as some rank; returns its exit code and the status file."""
    monkeypatch.setattr(worker, "_resolved", lambda loaded: loaded.config)
    monkeypatch.setattr(worker, "torchrun_world", lambda device: None)
    path = tmp_path / "status.json"

    def run(rank, outcome):
        def body(config, world):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setenv("RANK", str(rank))
        code = worker.work(load([]), body, status=path)
        return code, json.loads(path.read_text()) if path.exists() else None

    run.path = path
    return run


@pytest.mark.parametrize("code", [0, 1, 2, 64])
def test_rank_0_reports_the_code_of_the_job(rank, code):
    assert rank(0, code) == (code, {"exit_code": code, "rank": 0, "error": ""})


def test_other_ranks_report_failures_alone(rank):
    assert rank(1, 0) == (0, None)
    assert rank(1, 64) == (64, None)
    code, status = rank(1, 1)
    assert code == 1 and status["rank"] == 1


def test_bad_input_is_one_line_from_the_first_rank_that_sees_it(rank, capsys):
    assert rank(1, DataError("truncated store"))[0] == 2
    assert rank(0, ConfigError("the same, later"))[0] == 2
    assert capsys.readouterr().err == "error: truncated store\n"
    assert json.loads(rank.path.read_text()) == {"exit_code": 2, "rank": 1, "error": "truncated store"}


def test_an_unexpected_error_keeps_its_traceback(rank):
    with pytest.raises(ZeroDivisionError):
        rank(1, ZeroDivisionError("by zero"))
    status = json.loads(rank.path.read_text())
    assert status == {"exit_code": 1, "rank": 1, "error": "ZeroDivisionError: by zero"}
