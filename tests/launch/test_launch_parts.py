"""The launcher's parts, without starting torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from launch import command, local, processes
from launch.__main__ import main, split
from launch.failure import Failure, first_failure
from launch.local import Job
from launch.protocol import read_status

REPORT = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
longctx FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 11)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  rank      : 3 (local_rank: 3)
  exitcode  : {code} (pid: 10)
============================================================
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Run a job whose torchrun is a few lines of Python that get STATUS and LOG as arguments."""

    def run(program, *, status=True, log=True):
        where = {"status": tmp_path / "run" / "status.json", "log": tmp_path / "logs" / "torchrun.log"}

        def agent(arguments, *, log, python):
            return [sys.executable, "-c", program, str(where["status"]), str(log)]

        monkeypatch.setattr(command, "agent", agent)
        job = Job(
            argv=("x.py",),
            processes=1,
            status=where["status"] if status else None,
            log=where["log"] if log else None,
        )
        return local.run(job)

    return run


def report_then_exit(code, status):
    return (
        "import sys, pathlib\n"
        f"pathlib.Path(sys.argv[1]).write_text({json.dumps(status)!r})\n"
        f"pathlib.Path(sys.argv[2]).write_text({REPORT.format(code=1)!r})\n"
        f"sys.exit({code})\n"
    )


def fail_with(code):
    return f"import sys; open(sys.argv[2], 'w').write({REPORT.format(code=code)!r}); sys.exit(1)"


@pytest.mark.parametrize("code", [0, 2, 3, 64, 65])
def test_the_reported_code_is_returned(fake, capfd, code):
    status = {"exit_code": code, "rank": 0, "error": "said already"}
    assert fake(report_then_exit(0 if code == 0 else 1, status)) == code
    assert capfd.readouterr().err == ""


def test_a_failure_is_said_again_last_with_its_rank(fake, capfd):
    status = {"exit_code": 1, "rank": 2, "error": "ValueError: bad"}
    assert fake(report_then_exit(1, status)) == 1
    assert capfd.readouterr().err == "error: rank 2 failed first: ValueError: bad\n"


def test_a_killed_worker_is_the_cause_whatever_its_peers_report(fake, capfd):
    status = {"exit_code": 1, "rank": 0, "error": "PeerLost: lost a peer"}
    program = report_then_exit(1, status).replace("exitcode  : 1 (pid: 11)", "exitcode  : -9 (pid: 11)")
    assert fake(program) == 1
    stderr = capfd.readouterr().err
    assert "rank 1 died first, killed by SIGKILL" in stderr and "PeerLost" not in stderr


def test_a_worker_that_torchrun_ended_is_not_the_cause(fake, capfd):
    status = {"exit_code": 1, "rank": 0, "error": "ValueError: bad"}
    program = report_then_exit(1, status).replace("exitcode  : 1 (pid: 11)", "exitcode  : -15 (pid: 11)")
    assert fake(program) == 1
    assert capfd.readouterr().err == "error: rank 0 failed first: ValueError: bad\n"


def test_done_is_not_believed_when_a_worker_died_afterwards(fake, capfd):
    assert fake(report_then_exit(1, {"exit_code": 0, "rank": 0, "error": ""})) == 1
    assert "rank 3 failed first" in capfd.readouterr().err


def test_a_killed_worker_is_named(fake, capfd):
    assert fake(fail_with(-9)) == 1
    stderr = capfd.readouterr().err
    assert "rank 3 died first, killed by SIGKILL" in stderr and "torchrun.log" in stderr
    assert fake(fail_with(-9), status=False, log=False) == 1
    assert "killed by SIGKILL" in capfd.readouterr().err


def test_torchruns_own_failure_is_shown_whole(fake, capfd):
    assert fake("import sys; open(sys.argv[2], 'w').write('no such option'); sys.exit(2)") == 2
    assert "no such option" in capfd.readouterr().err


def test_a_torchrun_killed_by_a_signal_is_no_success(fake):
    assert fake("import os; os.kill(os.getpid(), 9)") == 128 + 9


def test_a_half_written_status_counts_as_none(fake, tmp_path):
    program = "import sys; open(sys.argv[1], 'w').write('{\"exit_code\": 6'); sys.exit(7)"
    assert fake(program) == 7
    assert read_status(tmp_path / "run" / "status.json") is None
    assert read_status(tmp_path / "absent") is None


def test_signal_handlers_are_given_back(fake):
    before = signal.getsignal(signal.SIGTERM)
    fake("pass")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_taken_port_is_refused_before_the_start(fake, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["local", "--set=processes=1", f"--port={port}", "--", "x.py"]) == 3
    stderr = capfd.readouterr().err
    assert f"port {port}" in stderr and "Address already in use" in stderr and "run.port" in stderr
    assert local.port_problem(port) is None
    assert local.port_problem(0) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "rank 3 died first, killed by SIGKILL; the system kills so when memory runs out"),
        (-11, "rank 3 died first, killed by SIGSEGV"),
        (-99, "rank 3 died first, killed by signal 99"),
        (1, "rank 3 failed first, with exit code 1"),
    ],
)
def test_the_root_cause_of_a_report(code, words):
    failure = first_failure(REPORT.format(code=code))
    assert failure == Failure(rank=3, exit_code=code)
    assert str(failure) == words


def test_a_report_without_root_cause():
    assert first_failure("RendezvousTimeoutError") is None


def test_torchrun_arguments():
    arguments = command.torchrun(["-m", "longctx", "train"], processes=4, port=0, run_id="a")
    assert arguments[-3:] == ["-m", "longctx", "train"]
    assert "--nproc-per-node=4" in arguments
    assert "--rdzv-endpoint=127.0.0.1:0" in arguments
    assert "--rdzv-conf=is_host=true" in arguments


def test_cores_are_shared_and_the_users_choice_stays():
    assert command.environment({}, processes=2, cores=8)["OMP_NUM_THREADS"] == "4"
    assert command.environment({}, processes=8, cores=2)["OMP_NUM_THREADS"] == "1"
    kept = command.environment({"OMP_NUM_THREADS": "3", "PATH": "/bin"}, processes=2, cores=8)
    assert kept["OMP_NUM_THREADS"] == "3" and kept["PATH"] == "/bin"


def test_everything_after_the_first_dashes_is_the_program():
    assert split(["local", "--port=1", "--", "-m", "x", "--", "y"]) == (
        ["local", "--port=1"],
        ["-m", "x", "--", "y"],
    )


@pytest.mark.parametrize(
    "argv", [["local", "--set=processes=2"], ["local", "--processes=2", "--", "x"], ["slurm"], ["torchrun"]]
)
def test_a_wrong_command_line_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_an_unknown_verb_names_the_closest(capsys):
    assert main(["lokal"]) == 2 and main([]) == 2
    assert "did you mean local?" in capsys.readouterr().err


def test_a_dry_run_prints_the_command_and_starts_nothing(capsys):
    assert main(["local", "--set=processes=2", "--dry-run", "--", "-m", "longctx", "train", "a b.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "torch.distributed.run" in printed and "'a b.yaml'" in printed


def test_children_and_parents_from_proc():
    with subprocess.Popen(["sleep", "30"]) as child:
        assert child.pid in processes.children(os.getpid())
        assert processes.parent_of(child.pid) == os.getpid()
        processes.send([child.pid], signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
    assert processes.parent_of(child.pid) is None
    processes.send([child.pid], signal.SIGTERM)  # gone: no error
