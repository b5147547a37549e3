"""Real processes, real SIGKILL: what the matrix of single faults does not show."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from rehearsal import (
    COMMON,
    ROOT,
    SIZE,
    assert_survivors_stayed,
    children,
    events,
    left_over,
    reference,
    rehearse,
    rows,
    run_whole,
    state,
)
from tiny import overrides, write_corpus

from longctx.recovery.faults import Fault, write_plan

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "keep")


def nodes_of(base, verb, arguments):
    """Starts the nodes of one job, of two ranks each, as their users would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(name):
        line = ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d"]
        line += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
        line.append(f"--rdzv-conf=is_host={'true' if name == 'first' else 'false'}")
        job = ["-m", "longctx", verb, "recipes/quickstart.yaml", *arguments]
        command = [sys.executable, "-m", "torch.distributed.run", *line, *job]
        with (base / f"{name}.log").open("w") as words:
            environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            return subprocess.Popen(command, cwd=ROOT, stdout=words, stderr=words, env=environment)

    return start


def said(base):
    """What the nodes have printed."""
    return {path.name: path.read_text() for path in base.glob("*.log")}


def wait_for_steps(folder, count, run):
    """Until so many lines are in metrics.jsonl."""
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < count:
        assert run.poll() is None
        time.sleep(0.02)


@pytest.mark.timeout(200)
def test_several_at_once_rank_0_among_them_and_one_during_the_recovery(tmp_path):
    expected = reference(tmp_path, "fsdp4")
    strikes = [
        "6:0:backward",
        "6:2:backward",
        "*:1:transfer",
        "20:3:keep:corrupt",
        "21:2:forward",
        "*:1:end",
    ]
    code, words, folder = rehearse(tmp_path, "fsdp4", strikes, "recovery.replicas=3")
    assert code == 0, words
    assert len(list((folder / "chaos").glob("struck-*.json"))) == len(strikes), words
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    assert events(folder, "mismatch") == []
    assert_survivors_stayed(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twenty_kills_leave_no_descriptor_and_no_memory_behind(tmp_path):
    expected = reference(tmp_path, "fsdp4", "train.steps=90")
    strikes = [f"{4 * (k + 1)}:{1 + k % 3}:{PHASES[k % len(PHASES)]}" for k in range(20)]
    code, words, folder = rehearse(tmp_path, "fsdp4", strikes, "train.steps=90", timeout=390)
    assert code == 0, words
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    found = events(folder, "recovered")
    stayed = [(event["descriptors"][0], event["rss_mibs"][0]) for event in found]  # rank 0 is never killed
    assert len({event["pids"][0] for event in found}) == 1 and len(found) >= 18
    assert max(d for d, _ in stayed[5:]) <= max(d for d, _ in stayed[:5]) + 4, stayed
    assert max(m for _, m in stayed[5:]) <= max(m for _, m in stayed[:5]) + 48, stayed


@pytest.mark.timeout(200)
def test_two_nodes_find_each_other_and_replace_a_rank_on_either(tmp_path):
    expected, folder = reference(tmp_path, "fsdp4", "train.steps=24"), tmp_path / "nodes"
    faults = ["--strike=10:3:backward", "--strike=17:0:optimizer"]
    options = [*overrides(tmp_path, "nodes", layout={"dp_shard": 4}), *COMMON, "train.steps=24"]
    start = nodes_of(tmp_path, "chaos", ["--yes", *faults, *options])
    nodes = [start("first"), start("second")]
    codes = [node.wait(timeout=180) for node in nodes]
    assert codes == [0, 0], said(tmp_path)
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    assert [event["lost"][0]["rank"] for event in events(folder, "recovered")] == [3, 0]
    assert left_over(folder) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_node_takes_the_place_of_one_that_is_gone_and_the_run_resumes(tmp_path):
    extra = ("checkpoint.every=4", "train.steps=36")
    expected, folder = reference(tmp_path, "fsdp4", *extra), tmp_path / "moved"
    options = [*overrides(tmp_path, "moved", layout={"dp_shard": 4}), *COMMON, *extra]
    start = nodes_of(tmp_path, "train", options)
    first, second = start("first"), start("second")
    wait_for_steps(folder, 10, first)
    gone = [second.pid, *children(second.pid)]
    for pid in gone:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    third = start("third")
    assert [first.wait(timeout=200), third.wait(timeout=60)] == [0, 0], said(tmp_path)
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    resumed = [event["resumed_from"] for event in events(folder, "start")]
    assert len(resumed) == 2 and resumed[1]
    assert left_over(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["first", "second"])
@pytest.mark.timeout(300)
def test_a_supervisor_that_is_stopped_is_missed_by_the_other_node(tmp_path, stopped):
    extra = ("checkpoint.every=4", "train.steps=2000")
    write_corpus(tmp_path / "docs")
    options = [*overrides(tmp_path, "stopped", layout={"dp_shard": 4}), *COMMON, *extra]
    start = nodes_of(tmp_path, "train", options)
    nodes = {"first": start("first"), "second": start("second")}
    wait_for_steps(tmp_path / "stopped", 6, nodes["first"])
    supervisor = min(children(nodes[stopped].pid))
    os.kill(supervisor, signal.SIGSTOP)
    expected = "the first node's supervisor" if stopped == "first" else "the supervisor of node 1"
    other = tmp_path / ("second.log" if stopped == "first" else "first.log")
    until = time.monotonic() + 60
    while f"{expected} has been silent" not in other.read_text():
        assert time.monotonic() < until, said(tmp_path)
        time.sleep(0.5)
    for node in nodes.values():
        for pid in [*children(node.pid), node.pid]:
            os.kill(pid, signal.SIGKILL)
        node.wait()


@pytest.mark.timeout(200)
def test_what_no_memory_has_comes_from_the_checkpoint_or_ends_with_one_clear_error(tmp_path):
    expected = reference(tmp_path, "fsdp4", "checkpoint.every=8", "train.steps=18")
    both = ["12:1:forward", "12:2:forward"]  # rank 2 holds the copy of rank 1
    keep = ("checkpoint.every=8", "train.steps=18")
    code, words, folder = rehearse(tmp_path, "fsdp4", both, *keep, name="saved")
    assert code == 0, words
    assert "going back to checkpoint" in words
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    (event,) = [e for e in events(folder, "recovered") if "checkpoint" in e]
    assert event["step"] == 8 and events(folder, "mismatch") == []

    code, words, folder = rehearse(tmp_path, "fsdp4", both, "train.steps=18", name="unsaved")
    assert code == 65, words
    assert "the state of ranks [1] is in no peer's memory" in words and "checkpoint.every" in words
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 65
    assert left_over(folder) == []


@pytest.mark.timeout(200)
def test_a_dead_supervisor_is_torchruns_to_restart_from_the_newest_checkpoint(tmp_path):
    extra = ("checkpoint.every=4", "train.steps=16")
    expected = reference(tmp_path, "fsdp4", *extra)
    folder = tmp_path / "restarted"
    write_plan([Fault(step=10, rank=2, phase="forward", kind="supervisor")], folder / "chaos" / "plan.json")
    options = [*overrides(tmp_path, "restarted", layout={"dp_shard": 4}), *COMMON, *extra]
    line = [
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={SIZE}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--rdzv-conf=is_host=true",
        "--local-addr=127.0.0.1",
        "--max-restarts=1",
    ]
    job = ["-m", "longctx", "chaos", "recipes/quickstart.yaml", "--yes", *options]
    code, words = run_whole([sys.executable, "-m", *line, *job], 180)
    assert code == 0, words
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
    resumed = [event["resumed_from"] for event in events(folder, "start")]
    assert resumed[0] is None and resumed[1].endswith("step-00000008")
    assert left_over(folder) == []


@pytest.mark.timeout(200)
def test_ctrl_c_on_torchruns_own_line_saves(tmp_path):
    write_corpus(tmp_path / "docs")
    folder = tmp_path / "interrupted"
    options = [*overrides(tmp_path, "interrupted", layout={"dp_shard": 2}), *COMMON, "train.steps=100000"]
    line = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    line += ["--rdzv-conf=is_host=true", "--local-addr=127.0.0.1", "-m", "longctx", "train"]
    command = [sys.executable, "-m", "torch.distributed.run", *line, "recipes/quickstart.yaml", *options]
    with (tmp_path / "words").open("w") as words:
        run = subprocess.Popen(command, cwd=ROOT, stdout=words, stderr=words, start_new_session=True)
    wait_for_steps(folder, 4, run)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(timeout=100)
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 64, (
        tmp_path / "words"
    ).read_text()
    assert events(folder, "recovered") == [] and len(events(folder, "stop")) == 1
    saved = max(path.name for path in (folder / "ckpt").glob("step-*"))
    assert int(saved.removeprefix("step-")) == rows(folder)[-1][0]
    assert left_over(folder) == []


@pytest.mark.timeout(200)
def test_a_bug_that_comes_again_ends_the_run_with_65_and_its_words(tmp_path):
    write_corpus(tmp_path / "docs")
    strikes = ["4:1:forward:exception"] * 2
    code, words, folder = rehearse(tmp_path, "fsdp4", strikes, "recovery.max_failures=1", name="bug")
    assert code == 65, words
    assert "rank 1 failed 2 times in a row without a new step" in words and "InjectedError" in words
    assert left_over(folder) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("log_every", "found"), [(1, ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])), (20, ([],))])
def test_a_restart_without_a_checkpoint_never_begins_anew_in_silence(tmp_path, log_every, found):
    write_corpus(tmp_path / "docs")
    folder = tmp_path / "bare"
    write_plan([Fault(step=6, rank=1, phase="forward", kind="supervisor")], folder / "chaos" / "plan.json")
    options = [*overrides(tmp_path, "bare", layout={"dp_shard": 2}), *COMMON, "train.steps=12"]
    options.append(f"metrics.log_every={log_every}")
    line = ["--nnodes=1", "--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=true", "--local-addr=127.0.0.1"]
    job = ["-m", "longctx", "chaos", "recipes/quickstart.yaml", "--yes", *options]
    code, words = run_whole([sys.executable, "-m", "torch.distributed.run", *line, *job], 180)
    assert code != 0 and "there is no checkpoint to go back to" in words
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 65
    assert [row[0] for row in rows(folder)] in found


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_without_recovery_torchrun_restarts_all_ranks_from_the_newest_checkpoint(tmp_path):
    extra = ("recovery.mode=off", "checkpoint.every=4", "train.steps=16", "run.resume=true")
    expected = reference(tmp_path, "fsdp4", *extra[1:3])
    options = [*overrides(tmp_path, "off", layout={"dp_shard": 4}), *COMMON, *extra]
    line = ["--nnodes=1", f"--nproc-per-node={SIZE}", "--max-restarts=1", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=true", "--local-addr=127.0.0.1"]
    job = ["-m", "longctx", "train", "recipes/quickstart.yaml", *options]
    with (tmp_path / "words").open("w") as words:
        command = [sys.executable, "-m", "torch.distributed.run", *line, *job]
        run = subprocess.Popen(command, cwd=ROOT, stdout=words, stderr=words)
    folder = tmp_path / "off"
    wait_for_steps(folder, 10, run)
    os.kill(max(children(run.pid)), signal.SIGKILL)
    assert run.wait(timeout=150) == 0, (tmp_path / "words").read_text()
    assert rows(folder) == rows(expected) and state(folder) == state(expected)
