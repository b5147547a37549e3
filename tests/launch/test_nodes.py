"""What runs around the training step, without a scheduler: preflight, verdict, logs, hang, topology."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import attempts, exclusion, hang, preflight, topology
from launch.__main__ import main
from launch.attempts import Attempt
from launch.attend import shrink
from launch.begin import Start, begin, judge
from launch.errors import PreflightError, SpecError
from launch.outcome import End, verdict
from launch.preflight import Answer, Demands

SUPPORT = Path(__file__).parents[1] / "support"


def answer(node, *, problems=(), topology="", **versions):
    facts = {"versions": {"torch": "2.13.0", **versions}, "topology": topology}
    return Answer(node=node, facts=facts, problems=problems)


def start(folder, **changes):
    values = {
        "folder": folder,
        "attempt": "7.0",
        "later": 0,
        "nodes": 2,
        "candidates": ["n1", "n2", "n3"],
        "processes": 2,
        "preflight": False,
        "no_progress": 2,
        "progress": "ckpt/*",
        "topology": "slurm",
    }
    return Start(**(values | changes))


def test_this_machine_is_examined(tmp_path, capsys):
    found = preflight.examine(Demands(folder=tmp_path), "here")
    assert found.problems == () and found.facts["versions"]["python"].startswith("3.")
    assert found.facts["clock_s"] < 5 and found.facts["disk_bytes"] > 0
    assert main(["doctor", f"--folder={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        ({"disk": 2**60}, "site.checks.disk"),
        ({"shm": 2**60}, "site.checks.shm"),
        ({"devices": 99}, "GPUs answer, wanted 99"),
        ({"clock": -1.0}, "site.checks.clock"),
    ],
)
def test_what_a_machine_lacks_is_named(tmp_path, demand, words):
    (problem,) = preflight.examine(Demands(folder=tmp_path, **demand), "here").problems
    assert words in problem


def test_a_run_folder_that_is_not_there_is_named(tmp_path):
    problems = preflight.examine(Demands(folder=tmp_path / "none"), "here").problems
    assert any("not writable" in each for each in problems)


def test_gpus_with_ecc_errors_and_xids_are_named(tmp_path, monkeypatch):
    smi, dmesg = tmp_path / "nvidia-smi", tmp_path / "dmesg"
    smi.write_text("#!/bin/sh\nprintf 'H100, 0\\nH100, 3\\n'\n")
    dmesg.write_text(
        "#!/bin/sh\necho '[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.'\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    smi.chmod(0o755), dmesg.chmod(0o755)
    (problem,) = preflight.examine(Demands(folder=tmp_path, devices=2), "here").problems
    assert "GPU 1 has uncorrected ECC errors" in problem
    smi.write_text("#!/bin/sh\nprintf 'H100, 0\\nH100, 0\\n'\n")
    (problem,) = preflight.examine(Demands(folder=tmp_path, devices=2), "here").problems
    assert "Xid 79" in problem


def test_silent_unfit_and_different_nodes_are_left_out():
    answers = {
        "a": answer("a"),
        "b": answer("b", torch="2.12.0"),
        "c": answer("c", problems=("no disk",)),
        "d": answer("d"),
    }
    bad = judge(["a", "b", "c", "d", "e"], answers)
    assert bad == {
        "b": "torch is 2.12.0, elsewhere 2.13.0",
        "c": "no disk",
        "e": "it did not answer",
    }


def test_spares_step_in_and_too_few_nodes_end_the_attempt(tmp_path):
    scratch = tmp_path / "launch" / "7.0"
    scratch.mkdir(parents=True)
    for node, problems in {"n1": ("bad",), "n2": (), "n3": ()}.items():
        preflight.write(answer(node, problems=problems), scratch)
    lines = begin(start(tmp_path, preflight=True))
    assert lines[0] == "preflight: n1 is left out: bad"
    assert (scratch / "hosts").read_text() == "n2\nn3\n"
    assert "<svg" in (tmp_path / "launch" / "ranks.svg").read_text()
    with pytest.raises(PreflightError, match="2 of 3 nodes are fit, the job needs 3"):
        begin(start(tmp_path, preflight=True, nodes=3))


KIND = "|gpu|(null)|8|1000|"


@pytest.mark.parametrize(
    ("nodes", "asked", "excluded", "away"),
    [
        (["n1|gpu|(null)|8|1000|mix", f"n2{KIND}mix", f"n3{KIND}idle"], 2, [], ["n1"]),
        (["n1|gpu|(null)|8|1000|mix", f"n2{KIND}mix", f"n3{KIND}idle"], 3, [], []),
        ([f"n1{KIND}mix", f"n2{KIND}mix", f"n3{KIND}down*"], 2, [], []),
        ([f"n1{KIND}mix", f"n2{KIND}mix", "n3|cpu|(null)|8|1000|idle"], 2, [], []),
        ([f"n1{KIND}mix", f"n2{KIND}mix", f"n3{KIND}idle"], 2, ["n3"], []),
        ([f"n1{KIND}mix", f"n2{KIND}mix", f"n3{KIND}idle", f"n4{KIND}idle"], 2, ["n3"], ["n3", "n1"]),
        ([f"n1{KIND}mix", f"n2{KIND}mix", f"n3{KIND}idle"], 2, ["n1"], []),
    ],
)
def test_who_failed_is_excluded_where_enough_of_the_same_kind_are_left(nodes, asked, excluded, away):
    choice = exclusion.Choice(asked=asked, nodes=nodes, excluded=excluded)
    assert exclusion.exclusion(["n1"], ["n1", "n2"], choice) == away


def test_a_node_that_failed_before_comes_last(tmp_path):
    scratch = tmp_path / "launch" / "7.0"
    scratch.mkdir(parents=True)
    for node, problems in {"n1": ("bad",), "n2": (), "n3": ()}.items():
        preflight.write(answer(node, problems=problems), scratch)
    choice = exclusion.Choice(asked=3, nodes=[], excluded=[])
    begin(start(tmp_path, preflight=True, choice=choice))
    preflight.write(answer("n1"), scratch)  # it is well again
    begin(start(tmp_path, preflight=True, later=1))
    assert (scratch / "hosts").read_text() == "n2\nn3\n"
    begin(start(tmp_path, preflight=True, later=2, nodes=3, no_progress=9))
    assert (scratch / "hosts").read_text() == "n1\nn2\nn3\n" and not (scratch / "exclude").exists()
    exclusion.forget(tmp_path)
    begin(start(tmp_path, preflight=True))
    assert (scratch / "hosts").read_text() == "n1\nn2\n"


def test_a_taken_port_and_another_image_are_named(tmp_path):
    scratch = tmp_path / "launch" / "7.0"
    scratch.mkdir(parents=True)
    (tmp_path / "launch" / "job.json").write_text('{"versions": {"torch": "2.11.0"}}')
    for node in ("n1", "n2", "n3"):
        preflight.write(answer(node), scratch)
    lines = begin(start(tmp_path, preflight=True))
    assert lines[0] == "preflight: torch is 2.13.0 on the nodes and 2.11.0 where the job was submitted"
    taken = answer("n1")
    taken.facts["port_free"] = False
    preflight.write(taken, scratch)
    with pytest.raises(PreflightError, match="taken on n1"):
        begin(start(tmp_path, preflight=True))


def test_a_name_that_does_not_resolve_is_named(tmp_path):
    (problem,) = preflight.examine(
        Demands(folder=tmp_path, names=("localhost", "none.invalid")), "x"
    ).problems
    assert "none.invalid does not resolve" in problem


def test_nodes_that_did_not_meet_are_named(tmp_path):
    begin(start(tmp_path))
    (tmp_path / "launch" / "7.0" / "node-0").mkdir()
    (tmp_path / "launch" / "7.0" / "node-0" / "torchrun.log").write_text("RendezvousTimeoutError\n")
    assert (
        "did not meet" in verdict(end(tmp_path))[1][0] and "n2 never started" in verdict(end(tmp_path))[1][0]
    )


def test_no_progress_is_a_verdict_and_progress_is_none(tmp_path):
    for later in (0, 1):
        begin(start(tmp_path, later=later))
    with pytest.raises(Exception, match="got no further") as stuck:
        begin(start(tmp_path, later=2))
    assert stuck.value.exit_code == 65
    (tmp_path / "ckpt" / "step-00000001").mkdir(parents=True)
    begin(start(tmp_path, later=2))
    begin(start(tmp_path, later=0))  # a new submission by a person counts anew


def test_a_cut_line_among_the_attempts_is_left_out(tmp_path):
    attempts.append(tmp_path, Attempt(attempt="1.0", time=0.0, later=0, progress=""))
    with (tmp_path / attempts.FILE).open("a") as file:
        file.write('{"attempt": "1.')
    assert [each.attempt for each in attempts.read(tmp_path)] == ["1.0"]


def end(folder, **changes):
    values = {"folder": folder, "attempt": "7.0", "code": 1, "processes": 2, "failures": 0}
    return End(**(values | changes))


def report(rank, code):
    return f"Root Cause (first observed failure):\n  rank      : {rank} (x)\n  exitcode  : {code} (pid: 1)\n"


def test_the_cause_is_a_rank_its_node_and_its_traceback(tmp_path):
    begin(start(tmp_path))
    scratch = tmp_path / "launch" / "7.0"
    logs = scratch / "node-1" / "job_x" / "attempt_0" / "1"
    logs.mkdir(parents=True)
    (logs / "stderr.log").write_text("noise\nTraceback (most recent call last):\n  File x\nValueError: bad\n")
    (scratch / "node-1" / "torchrun.log").write_text(report(3, 1))
    code, lines = verdict(end(tmp_path))
    assert code == 1 and lines[0] == "error: rank 3 on n2 failed first: rank 3 failed first, with exit code 1"
    assert lines[1:4] == ["Traceback (most recent call last):", "  File x", "ValueError: bad"]
    (scratch / "node-0").mkdir()
    (scratch / "node-0" / "torchrun.log").write_text(report(0, -9))
    (tmp_path / "status.json").write_text('{"exit_code": 1, "rank": 3, "error": "PeerLost"}')
    assert "rank 0 on n1 failed first: rank 0 died first, killed by SIGKILL" in verdict(end(tmp_path))[1][0]


@pytest.mark.parametrize(
    ("status", "code", "result"),
    [(0, 0, 0), (0, 1, 1), (64, 1, 64), (65, 1, 65), (2, 1, 2), (None, 137, 137)],
)
def test_the_exit_code_of_an_attempt(tmp_path, status, code, result):
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps({"exit_code": status, "rank": 0, "error": ""}))
    assert verdict(end(tmp_path, code=code))[0] == result


def test_failures_are_tried_again_as_often_as_allowed(tmp_path):
    begin(start(tmp_path))
    assert verdict(end(tmp_path, failures=1))[0] == 64
    begin(start(tmp_path, attempt="7.1", later=1))
    assert verdict(end(tmp_path, attempt="7.1", failures=1))[0] == 1


def test_node_order_and_rank_map(tmp_path):
    names = ["n10", "n9", "n1"]
    assert topology.order(names, source="slurm", addresses={}) == ["n1", "n9", "n10"]
    switches = {"n1": "s2.n1", "n9": "s1.n9", "n10": "s1.n10"}
    assert topology.order(names, source="slurm", addresses=switches) == ["n9", "n10", "n1"]
    (tmp_path / "order").write_text("n9  # rack 1\nn1\nn10\n")
    assert topology.order(names, source=f"{tmp_path}/order", addresses={}) == ["n9", "n1", "n10"]
    with pytest.raises(SpecError, match="does not name n2"):
        topology.order(["n2"], source=f"{tmp_path}/order", addresses={})
    assert topology.rank_map(["a", "bb"], 2) == ["node 0  a   ranks 0 to 1", "node 1  bb  ranks 2 to 3"]
    assert topology.picture(["a<b"], 2).count("<rect") == 2


def test_a_file_that_grows_too_large_gives_its_middle_back(tmp_path):
    path = tmp_path / "stdout.log"
    with path.open("wb") as file:
        for number in range(40000):
            file.write(b"line %06d\n" % number)
        file.flush()
        os.fsync(file.fileno())
        assert shrink(path, 64 * 1024)
        file.write(b"still writing\n")
    content = path.read_bytes()
    assert content.startswith(b"line 000000\n") or content.startswith(b"\0")  # no holes: all is dropped
    assert content.endswith(b"line 039999\nstill writing\n") or content.endswith(b"\0still writing\n")
    assert path.stat().st_blocks * 512 <= 64 * 1024 + 8192
    assert not shrink(path, 2**20)


COMM = """import sys, time
def all_reduce():
    open(sys.argv[1] + ".ready", "w").close()
    time.sleep(60)
"""
RANK = """import faulthandler, signal, sys
from parallel import comm
faulthandler.register(signal.SIGUSR2, open(sys.argv[1], "w"))
def read_document():
    exec(compile(COMM.replace("all_reduce", "wait"), "disk.py", "exec"), globals())
    wait()
(comm.all_reduce if sys.argv[2] == "comm" else read_document)()
"""


def test_ranks_that_wait_and_the_one_they_wait_for(tmp_path):
    (tmp_path / "parallel").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "parallel" / "__init__.py").touch()
    (tmp_path / "parallel" / "comm.py").write_text(COMM)
    (tmp_path / "step.py").write_text(f"COMM = {COMM!r}\n{RANK}")
    kinds = ["comm", "disk", "comm"]
    stacks = [tmp_path / hang.STACKS.format(rank=rank) for rank in range(3)]
    ranks = [
        subprocess.Popen([sys.executable, tmp_path / "step.py", stack, kind])
        for kind, stack in zip(kinds, stacks, strict=True)
    ]
    try:
        wait_for(lambda: all(Path(f"{stack}.ready").exists() for stack in stacks))
        for rank in ranks:
            rank.send_signal(12)
        wait_for(lambda: all(stack.read_text() for stack in stacks))
        lines = hang.report(hang.read(tmp_path, 3))
        assert lines[-1] == "rank 0, 2 waits for rank 1"
        assert "waits in all_reduce" in lines[0] and "in wait" in lines[1]
        lines = hang.report(hang.read(tmp_path, 4))
        assert lines[-1] == "rank 0, 2 waits for rank 3, 1" and "no answer" in lines[3]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_all_in_collectives_the_odd_one_is_named():
    usual = hang.Place(waiting=True, frame="step.py:1 in f", call="all_reduce")
    other = dataclasses.replace(usual, call="all_gather")
    assert hang.report({0: usual, 1: usual, 2: other})[-1].endswith("rank 2 is not")
    assert "same collective" in hang.report({0: usual, 1: usual})[-1]


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_logs_and_status_of_a_folder_without_a_job(tmp_path, capsys):
    for verb in ("status", "logs", "requeue", "cancel"):
        assert main([verb, str(tmp_path)]) == 2
    assert "holds no launched job" in capsys.readouterr().err


def test_logs_show_a_rank_and_skip_the_hole(tmp_path, capsys):
    begin(start(tmp_path))
    (tmp_path / "launch" / "job.json").write_text('{"backend": "slurm", "ids": ["7"], "processes": 2}')
    folder = tmp_path / "launch" / "7.0" / "node-1" / "j" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_bytes(b"first\n" + b"\0" * 100 + b"last\n")
    assert main(["logs", str(tmp_path), "--rank=2"]) == 0
    assert capsys.readouterr().out == "first\n\n[... dropped, the limit is log_limit ...]\nlast\n"
    assert main(["logs", str(tmp_path), "--rank=9"]) == 2
    assert "rank 9 has no output" in capsys.readouterr().err
