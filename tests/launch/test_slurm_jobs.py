"""Batch scripts on a real Slurm; torchrun is played by one worker without torch, so a job takes seconds."""

import json
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.attempts import read as read_attempts

SUPPORT = Path(__file__).parents[1] / "support"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SITE = "checks: {disk: 1MiB, shm: 1MiB, timeout: 30}\nnetwork: {interface: lo}\n"


@pytest.fixture
def job(slurm, tmp_path, monkeypatch):
    """Submit a job with the stub as its interpreter; returns its ids."""
    for name, value in {**slurm.env, "REAL_PYTHON": sys.executable}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STUB_RUN", str(SUPPORT / "stub_run.py"))
    site = tmp_path / "site.yaml"
    site.write_text(SITE)
    stub = SUPPORT / "stub_python.sh"

    def submit(mode, *options, argv=(), bad="", follow=False):
        monkeypatch.setenv("BAD_NODES", bad)
        folder = submit.folder
        own = [f"--site={site}", f"--folder={folder}", f"--set=environment.python={stub}"]
        own += [] if follow else ["--no-follow"]
        code = main(["slurm", *own, *options, "--", str(folder), mode, *argv])
        if follow:
            return code
        assert code == 0
        return json.loads((folder / "launch" / "job.json").read_text())["ids"]

    submit.folder = tmp_path / "it's a $HOME run, 100%j"
    return submit


def ended(slurm, job_id):
    slurm.wait(lambda: slurm.job(job_id)["JobState"].split("+")[0] in ENDED, 40)
    return slurm.job(job_id)


def lines(folder):
    path = folder / "ran.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(folder):
    return "".join(path.read_text() for path in sorted((folder / "launch").glob("*.log")))


ODD = ["a b", "it's", 'say "so"', "$(touch /tmp/owned)", "`id`", "line\nbreak", "", "*", "--x=${HOME}", "\\"]


def test_argv_env_order_and_rendezvous_arrive_as_written(slurm, job):
    options = ["--set=nodes=2", "--set=env={TEST_ODD: \"two\\nlines $(id) 'x'\"}", "--set=name=odd name"]
    (job_id,) = job("done", *options, argv=ODD)
    state = ended(slurm, job_id)
    assert state["JobState"] == "COMPLETED", log(job.folder)
    ran = sorted(lines(job.folder), key=lambda line: line["rank"])
    assert [line["node"] for line in ran] == ["n1", "n2"]
    assert all(line["argv"] == ODD for line in ran)
    assert all(line["env"]["TEST_ODD"] == "two\nlines $(id) 'x'" for line in ran)
    hosts = [next(word for word in line["options"] if "is_host" in word) for line in ran]
    assert "is_host=true" in hosts[0] and "is_host=false" in hosts[1]
    assert "--local-addr=127.0.0.1" in ran[0]["options"] and "--local-addr=~00001" in ran[1]["options"]
    ids = {next(word for word in line["options"] if word.startswith("--rdzv-id")) for line in ran}
    assert ids == {f"--rdzv-id=job-{job_id}.0"}
    assert "node 1  n2  rank 1" in log(job.folder)


def test_a_node_that_fails_preflight_is_named_and_a_spare_takes_its_place(slurm, job):
    (job_id,) = job("done", "--set=nodes=2", "--set=spare_nodes=1", bad=",n1,")
    assert ended(slurm, job_id)["JobState"] == "COMPLETED", log(job.folder)
    assert sorted(line["node"] for line in lines(job.folder)) == ["n2", "n3"]
    assert "n1 is left out: " in log(job.folder) and "site.checks.disk" in log(job.folder)


def test_without_a_spare_a_bad_node_ends_the_job_with_3(slurm, job):
    (job_id,) = job("done", "--set=nodes=2", bad=",n1,")
    state = ended(slurm, job_id)
    assert state["ExitCode"] == "3:0" and lines(job.folder) == []
    assert "1 of 2 nodes are fit" in log(job.folder) and "exclude=n1" in log(job.folder)


def test_64_requeues_and_the_next_attempt_resumes_without_the_node_that_failed(slurm, job):
    (job_id,) = job("again:2", "--set=spare_nodes=1", argv=["x"], bad=",n1,")
    slurm.wait(lambda: slurm.restarted(job_id), 40)
    state = ended(slurm, job_id)
    assert state["JobState"] == "COMPLETED" and state["ExcNodeList"] == "n1" and state["NodeList"] == "n[2-3]"
    assert "later starts exclude n1" in log(job.folder) and log(job.folder).count("n1 is left out") == 1
    assert [line["argv"] for line in lines(job.folder)] == [["x"], ["x", "run.resume=true"]]
    assert [line["restart"] for line in lines(job.folder)] == [0, 1]
    ends = [each.exit_code for each in read_attempts(job.folder) if each.exit_code is not None]
    assert ends == [64, 0]


def test_an_array_goes_on_until_done_and_no_further(job, capsys):
    options = ["--set=spare_nodes=1", "--set=restart={mode: array, links: 3}"]
    assert job("again:2", *options, bad=",n1,", follow=True) == 0
    assert capsys.readouterr().out.count("nothing is left to do") == 1  # the last of three tasks
    assert log(job.folder).count("n1 is left out") == 1
    argvs = [line["argv"] for line in lines(job.folder)]
    assert argvs == [[], ["run.resume=true"]]
    assert "nothing is left to do" in log(job.folder)


def test_a_chain_goes_on_until_done_and_no_further(slurm, job):
    ids = job("again:2", "--set=spare_nodes=1", "--set=restart={mode: chain, links: 3}", bad=",n1,")
    assert len(ids) == 3
    assert ended(slurm, ids[-1])["ExcNodeList"] == "n1"
    assert [line["argv"] for line in lines(job.folder)] == [[], ["run.resume=true"]]


def test_a_heterogeneous_job_is_one_world(slurm, job):
    groups = "groups=[{nodes: 1, directives: {comment: big}}, {nodes: 1, directives: {comment: small}}]"
    (job_id,) = job("done", f"--set={groups}")
    assert ended(slurm, job_id)["JobState"] == "COMPLETED", log(job.folder)
    ran = lines(job.folder)
    assert sorted(line["rank"] for line in ran) == [0, 1] and len({line["node"] for line in ran}) == 2
    assert all("--nnodes=2" in line["options"] for line in ran)


def test_a_refused_directive_is_named_and_can_be_removed(slurm, job, capfd):
    with pytest.raises(AssertionError):
        job("done", "--directive=qos=none-such", "--directive=partition=none-such")
    stderr = capfd.readouterr().err
    assert "sbatch refused" in stderr and "--no-directive" in stderr
    (job_id,) = job("done", "--directive=partition=none-such", "--no-directive=partition")
    assert ended(slurm, job_id)["JobState"] == "COMPLETED"


def test_a_job_that_gets_no_further_ends_with_65(slurm, job):
    (job_id,) = job("stuck", "--set=restart.no_progress=1")
    slurm.wait(lambda: slurm.restarted(job_id), 30)
    state = ended(slurm, job_id)
    assert state["ExitCode"] == "65:0" and len(lines(job.folder)) == 1
    assert "got no further" in log(job.folder)


def test_a_failure_is_named_last_and_does_not_requeue(slurm, job):
    (job_id,) = job("fail", "--set=nodes=2")
    state = ended(slurm, job_id)
    assert state["ExitCode"] == "1:0" and state["Restarts"] == "0"
    assert "error: rank 0 on n1 failed first: ValueError: broken" in log(job.folder)


def test_the_schedulers_word_is_passed_on(slurm, job, capsys):
    (job_id,) = job("sleep")
    slurm.wait(lambda: len(lines(job.folder)) == 1, 30)
    assert main(["status", str(job.folder)]) == 0
    assert "RUNNING" in capsys.readouterr().out
    assert main(["requeue", str(job.folder)]) == 0  # USR1 to the batch shell, as --signal=B:USR1 does
    slurm.wait(lambda: slurm.restarted(job_id) and len(lines(job.folder)) == 2, 40)
    assert lines(job.folder)[1]["argv"] == ["run.resume=true"]
    assert main(["cancel", str(job.folder)]) == 0
    assert ended(slurm, job_id)["JobState"] == "CANCELLED"
    assert slurm.job(job_id)["Restarts"] == "1"


def test_the_follower_prints_the_log_and_returns_the_jobs_exit_code(job, capsys):
    assert job("bad", follow=True) == 2
    out = capsys.readouterr().out
    assert "node 0  n1  rank 0" in out and "rank 0 speaks" in out
