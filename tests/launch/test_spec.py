"""Job and site files: what is read, what is refused and in which words."""

import pytest

from launch import submit, units
from launch.__main__ import main
from launch.check import check, warnings
from launch.errors import LaunchError, SpecError
from launch.load import CLUSTERS, load


def loaded(*changes, **values):
    return check(load("", "", changes, values={"argv": ["x.py"], **values}))


@pytest.mark.parametrize("site", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_every_site_file_of_ours_is_valid(site):
    assert check(load("", site, values={"argv": ["x.py"]})).site.name == site


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nodez=2", "unknown key nodez; did you mean nodes?"),
        ("site.network.interfase=ib0", "did you mean network.interface?"),
        ("site.directive.mem=1", "did you mean directives?"),
        ("restart.mode=later", "choose one of requeue, chain, array, never"),
        ("nodes=two", "nodes='two' must be int"),
        ("nodes", "write key=value"),
        ("time_limit=4 lightyears", "no number of seconds"),
        ("log_limit=big", "no number of bytes"),
        ("env=[1]", "must be a mapping"),
        ("site.modules=cuda", "must be a list"),
        ("site=[", "no valid YAML"),
        ("nodes.x.y=1", "nodes"),
    ],
)
def test_a_wrong_key_or_value_is_named(change, words):
    with pytest.raises(SpecError, match=words.replace("?", r"\?")):
        load("", "", [change])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["site.devices=4", "processes=5"], "processes=5 of one node exceed its 4 devices"),
        (["site.devices=4", "devices=8"], "devices=8 exceeds site.devices=4"),
        (["nodes=0"], "nodes=0; choose at least 1"),
        (["time_limit=100", "stop_s=200.0"], "shorter than a step and a checkpoint save of 200 s"),
        (["time_limit=100"], "not above signal.before=180"),
        (["restart.mode=chain"], "choose at least 2"),
        (["groups=[{nodes: 1}]", "spare_nodes=1"], "spare_nodes"),
        (["groups=[{nodes: 1}]", "restart={mode: array, links: 2}"], "heterogeneous"),
        (["environment.image=a.sif"], "no container runtime"),
        (["site.network.port_first=80"], "between 1024 and 65535"),
        (["restart.min_nodes=1"], "restart.workers"),
        (["mounts=['/a,/b']"], "comma"),
        (["world=3"], "checked for 3 ranks"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes, words):
    with pytest.raises(SpecError, match=words):
        loaded(*changes)


def test_a_command_line_with_a_mistake_ends_with_2_and_submits_nothing(tmp_path, capsys):
    site = tmp_path / "mine.yaml"
    site.write_text("grass: 30\n")
    assert main(["slurm", f"--site={site}", f"--folder={tmp_path}/run", "--", "x.py"]) == 2
    assert "did you mean grace?" in capsys.readouterr().err
    assert main(["slurm", "--site=/none.yaml", "--", "x.py"]) == 2
    assert "known sites: slurm, slurm-pyxis, two-hosts, workstation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_sbatch_nothing_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", f"--folder={tmp_path}/run", "--", "x.py"]) == 3
    assert "sbatch is not on PATH" in capsys.readouterr().err


def test_defaults_are_filled_in():
    job = loaded("site.devices=8", "nodes=2").job
    assert (job.nodes, job.processes) == (2, 8) and job.folder.startswith("/")
    assert loaded("groups=[{nodes: 1}, {nodes: 3}]").job.nodes == 4
    assert loaded("devices=0", "site.devices=8").job.processes == 1


def test_the_measured_stop_decides_when_the_signal_comes():
    assert loaded("time_limit=1h").job.signal.before == 180
    job = loaded("time_limit=1h", stop_s=100.0)
    assert job.job.signal.before == 260 and warnings(job.job, job.site) == []


def test_a_stop_that_takes_longer_than_there_is_time_is_told():
    job = loaded("site.grace=30", "signal.before=120", stop_s=100.0)
    notes = warnings(job.job, job.site)
    assert any("set signal.before=260" in note for note in notes)
    assert any("30 s (site.grace)" in note and "saves in the background" in note for note in notes)
    assert warnings(loaded("site.grace=30", stop_s=2.0).job, job.site) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("4h", 14400), ("1-12:00:00", 129600), ("01:30", 90), (7, 7)],
)
def test_seconds(text, seconds):
    assert units.parse(text, "seconds") == seconds


@pytest.mark.parametrize("seconds", [0, 59, 3600, 90061])
def test_slurms_clock_is_read_back(seconds):
    assert units.parse(units.clock(seconds), "seconds") == seconds


def test_the_follower_waits_for_a_busy_controller_and_for_every_task(tmp_path, monkeypatch, capsys):
    task = {"JobState": "COMPLETED", "ExitCode": "0:0", "ArrayTaskId": "0"}
    waits = {"JobState": "PENDING", "ArrayTaskId": "1-2"}
    answers = [None, [waits, task], [{**task, "ArrayTaskId": "1", "ExitCode": "65:0"}, task]]

    def states(job_id):
        (tmp_path / f"7_{len(answers)}.log").write_text(f"log {len(answers)}\n")
        (tmp_path / "71.log").write_text("of another job\n")
        answer = answers.pop(0)
        if answer is None:
            raise LaunchError("Socket timed out")
        return answer

    monkeypatch.setattr(submit, "states", states)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    assert submit.follow("7", tmp_path) == 65
    assert sorted(capsys.readouterr().out.splitlines()) == ["log 1", "log 2", "log 3"]


def test_ctrl_c_leaves_the_job_and_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(job_id, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "submit", lambda job, script: ["7"])
    monkeypatch.setattr(submit, "follow", interrupted)
    assert main(["slurm", f"--folder={tmp_path}/a run", "--", "x.py"]) == 130
    assert f"the job goes on; longctx launch status|cancel '{tmp_path}/a run'" in capsys.readouterr().err
