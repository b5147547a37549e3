"""The job and site of a cluster on this machine: what applies, what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.check import check
from launch.errors import SpecError
from launch.here import job_here
from launch.load import load

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "launch_worker.py"


def here(*changes, **values):
    return job_here(
        check(load("", "", changes, values={"argv": ["x.py"], **values})), {"HOME": "/h", "B": "b"}
    )


def test_environment_secrets_and_setup(tmp_path):
    (tmp_path / "key").write_text("0123456789\n")
    job = here(
        "env={A: a, B: null}",
        f"secrets={{WANDB_API_KEY: '{tmp_path}/key'}}",
        "site.env={A: site, C: c}",
        "site.network.interface=eth7",
        "site.modules=[cuda/12.8]",
        "site.stage=[{source: /a b, target: /c}]",
        "environment.setup=['source x']",
        "restart.workers=2",
        "time_limit=1h",
    )
    interfaces = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7"}
    assert job.env == {"HOME": "/h", "A": "a", "C": "c", "WANDB_API_KEY": "0123456789", **interfaces}
    assert job.setup == ("module load cuda/12.8", "source x", "cp -r -- '/a b' /c || exit 3")
    assert (job.restarts, job.time_limit_s, job.before_s, job.processes) == (2, 3600, 180, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nodes=2", "nodes=2: this machine is one node"),
        ("spare_nodes=1", "spare_nodes=1: set it to 0"),
        ("restart={mode: chain, links: 2}", "restart.mode=chain: set it to never"),
        ("restart.failures=1", "restart.workers"),
        ("secrets={KEY: /none}", "secrets.KEY=/none cannot be read"),
        ("env={MY_TOKEN: abc}", "secrets.MY_TOKEN"),
    ],
)
def test_what_one_machine_cannot_do_is_refused(change, words):
    with pytest.raises(SpecError, match=words):
        here(change)


def test_an_image_is_refused():
    with pytest.raises(SpecError, match="inside the container"):
        here("environment.image=a.sif", "site.container.runtime=apptainer")


@pytest.fixture
def launched(tmp_path):
    """Run `launch local` with a site file; returns exit code and words."""
    folder = tmp_path / "a run"
    folder.mkdir()

    def run(mode, site, *options):
        (tmp_path / "site.yaml").write_text(json.dumps({"checks": {"disk": 1, "shm": 1}, **site}))
        own = [f"--site={tmp_path}/site.yaml", f"--folder={folder}", *options]
        command = [sys.executable, "-m", "launch", "local", *own, "--", str(WORKER), str(folder), mode]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
        return done.returncode, done.stderr

    run.folder = folder
    return run


def test_setup_runs_before_the_program_in_its_folder_and_exit_codes_pass(launched, tmp_path, capsys):
    work = tmp_path / "work here"
    work.mkdir()
    site = {"setup": ["export FROM_SETUP='it is'", "touch seen"]}
    code, said = launched("exit:0", site, f"--set=workdir={work}", "--set=processes=2")
    assert code == 0, said
    env = json.loads((launched.folder / "env.0").read_text())
    assert env["FROM_SETUP"] == "it is" and env["WORLD_SIZE"] == "2"
    assert (work / "seen").exists()
    assert main(["status", "--json", str(launched.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    assert main(["cancel", str(launched.folder)]) == 2
    assert "has ended" in capsys.readouterr().err


def test_the_time_limit_asks_and_then_kills(launched):
    code, said = launched("wait", {}, "--set=time_limit=40", "--set=signal.before=39")
    assert code == 64 and "39 s are left of time_limit=40" in said
    code, said = launched("deaf", {}, "--set=time_limit=6", "--set=signal.before=5")
    assert code == 137 and "killed" in said


def test_an_unfit_machine_is_not_started_on(launched):
    code, said = launched("exit:0", {"checks": {"disk": 2**60}})
    assert code == 3 and "site.checks.disk" in said and not (launched.folder / "env.0").exists()
