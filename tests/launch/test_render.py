"""Batch scripts as text: golden files, odd values, templates, credentials. No Slurm is needed."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import examples
from launch.__main__ import main
from launch.check import check, grace
from launch.directives import parse
from launch.errors import SpecError
from launch.hosts import lines as host_lines
from launch.load import Loaded, load
from launch.quote import quote
from launch.slurm import REQUIRED, TEMPLATES, render

ODD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
NAMES = st.from_regex(r"TEST_[A-Z0-9_]{1,8}X", fullmatch=True)
PRINTABLE = st.text(
    st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs", "Cc"])
)
needs_shellcheck = pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed"
)


def loaded(**values):
    return check(load("", "", values={"argv": ["x.py"], **values}))


def test_the_examples_are_what_the_code_renders():
    for name, example in examples.EXAMPLES.items():
        text = (examples.FOLDER / f"{name}.sbatch").read_text()
        assert text == examples.rendered(example), f"python -m launch examples, then read the diff of {name}"
    assert main(["examples", "--check"]) == 0


@needs_shellcheck
def test_shellcheck_has_nothing_to_say():
    files = [*sorted(examples.FOLDER.glob("*.sbatch")), TEMPLATES / "node.sh"]
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True)
    assert done.stdout == ""


def assignments(script):
    """What bash makes of the script up to the first command of Slurm, as JSON."""
    head = script.split("\nrestart=")[0].replace("|| exit 3", "|| true")
    tell = 'printf "%s\\0" "$folder" "${#python[@]}" "${python[@]}" "${program[@]}"; env -0 >"$TELL"'
    with tempfile.NamedTemporaryFile() as file:
        done = subprocess.run(
            ["bash", "-c", f"{head}\n{tell}"], env={**os.environ, "TELL": file.name}, capture_output=True
        )
        env = file.read()
    folder, count, *rest = [word.decode() for word in done.stdout.split(b"\0")[:-1]]
    pairs = dict(word.decode(errors="replace").partition("=")[::2] for word in env.split(b"\0") if word)
    return folder, rest[: int(count)], rest[int(count) :], pairs


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    argv=st.lists(ODD, min_size=1, max_size=5), env=st.dictionaries(NAMES, ODD, max_size=3), name=PRINTABLE
)
def test_bash_reads_argv_and_env_as_they_were_given(argv, env, name):
    script = render(loaded(argv=argv, env=env, folder="/runs/a b", name=name or "x"), {}, environ={})
    folder, _, program, seen = assignments(script)
    assert folder == "/runs/a b" and program == argv
    assert {key: seen[key] for key in env} == env


@needs_shellcheck
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    argv=st.lists(ODD, min_size=1, max_size=4), env=st.dictionaries(NAMES, ODD, max_size=3), folder=PRINTABLE
)
def test_odd_values_pass_shellcheck(argv, env, folder):
    script = render(loaded(argv=argv, env=env, folder=f"/runs/{folder}"), {}, environ={})
    done = subprocess.run(
        # SC1xxx: notes on letters such as unicode quotes, which a value may well hold
        ["shellcheck", "--severity=warning", "-e", "SC1015,SC1016,SC1018,SC1110,SC1111,SC1112,SC1017", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""


def test_every_directive_can_be_changed_removed_and_added():
    site = "directives: {partition: gpu, mem: 4G, exclusive: true, requeue: null}\nextra_lines: ['#BB x']\n"
    script = rendered_with(site, parse(["mem=8G", "--qos=high", "contiguous"], ["signal", "exclusive"]))
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for line in ("--partition=gpu", "--mem=8G", "--qos=high", "--contiguous"):
        assert f"#SBATCH {line}" in directives
    for name in ("requeue", "signal", "exclusive"):
        assert not any(f"--{name}" in line for line in directives)
    assert "\n#BB x\n" in script


def test_words_of_the_shell_itself_are_quoted():
    assert quote("then") == "'then'" and quote("thenceforth") == "thenceforth"


def test_all_directives_of_ours_can_go():
    names = ["job-name", "output", "open-mode", "signal", "requeue", "nodes", "ntasks-per-node"]
    assert "#SBATCH" not in rendered_with("", parse([], names))


def test_no_memory_directive_unless_asked():
    assert "--mem" not in rendered_with("", {})


def test_only_the_last_word_about_devices_counts():
    script = rendered_with("devices: 4\ndevice_directive: 'gres=gpu:a100:{devices}'\n", {})
    assert "#SBATCH --gres=gpu:a100:4" in script
    assert "gpu" not in "".join(rendered_with("devices: 4\ndevice_directive: ''\n", {}).split("#SBATCH")[1:8])


def rendered_with(site, changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "site.yaml")
        path.write_text(site)
        return render(check(load("", str(path), values={"argv": ["x.py"]})), changes, environ={})


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_no_credential_is_ever_written(name):
    with pytest.raises(SpecError, match=f"secrets.{name}"):
        render(loaded(env={name: "abc"}), {}, environ={})
    with pytest.raises(SpecError, match=f"value of {name}") as refused:
        render(loaded(argv=["x.py", "key=0123456789abcdef"]), {}, environ={name: "0123456789abcdef"})
    assert "0123456789" not in str(refused.value)
    script = render(loaded(secrets={name: "/home/me/my key"}), {}, environ={name: "0123456789abcdef"})
    assert f"{name}=$(cat -- '/home/me/my key')" in script


@pytest.mark.parametrize("placeholder", REQUIRED)
def test_a_template_that_lacks_a_placeholder_is_refused(tmp_path, placeholder):
    text = (TEMPLATES / "job.sbatch.j2").read_text()
    (tmp_path / "own.j2").write_text(
        text.replace(placeholder, "folder" if placeholder != "folder" else "nodes")
    )
    broken = load("", "", ["site.template=own.j2"], values={"argv": ["x.py"]})
    with pytest.raises(SpecError, match=rf"lacks the placeholder \{{\{{ {placeholder} \}}\}}"):
        render(Loaded(job=check(broken).job, site=broken.site, base=tmp_path), {}, environ={})


def test_a_template_with_an_unknown_name_is_refused(tmp_path):
    (tmp_path / "own.j2").write_text((TEMPLATES / "job.sbatch.j2").read_text() + "{{ tokens }}")
    broken = check(load("", "", ["site.template=own.j2"], values={"argv": ["x.py"]}))
    with pytest.raises(SpecError, match=r"uses \{\{ tokens \}\}"):
        render(Loaded(job=broken.job, site=broken.site, base=tmp_path), {}, environ={})


@pytest.mark.parametrize("change", [{"name": "a\nb"}, {"argv": ["a\0b"]}, {"env": {"A-B": "x"}}])
def test_what_no_script_can_hold_is_refused(change):
    with pytest.raises(SpecError):
        render(loaded(**change), {}, environ={})


def test_containers():
    apptainer = examples.rendered(examples.EXAMPLES["slurm-apptainer"])
    assert "apptainer exec --nv" in apptainer and "--bind=/shared/longctx:/shared/longctx" in apptainer
    pyxis = examples.rendered(examples.EXAMPLES["slurm-pyxis"])
    assert "--container-image=/shared/images/longctx.sqsh" in pyxis and "/data:/data:ro" in pyxis


def test_lines_for_hosts():
    both = check(load("", "two-hosts", ["nodes=2", "env={A: 'x y'}"], values={"argv": ["-m", "m", "it's"]}))
    first, second = host_lines(both, port=29400, run_id="r")
    assert (first.host, second.host) == ("node-a", "node-b")
    assert "is_host=true" in first.command and "is_host=false" in second.command
    assert "--rdzv-endpoint=node-a:29400" in second.command and "export A='x y'" in second.command
    assert "trap '' USR1 USR2 && exec " in first.command and first.command.endswith("'it'\"'\"'s'")
    with pytest.raises(SpecError, match="nodes=3 and 2 hosts"):
        host_lines(check(load("", "two-hosts", ["nodes=3"], values={"argv": ["x"]})), port=1, run_id="r")


def test_torchrun_prints_the_lines_and_starts_nothing(capsys, tmp_path):
    (tmp_path / "hosts").write_text("a  # first\n\nb\n")
    own = [f"--hosts={tmp_path}/hosts", "--set=nodes=2", f"--folder={tmp_path}/run"]
    assert main(["torchrun", *own, "--", "x.py"]) == 0
    out = capsys.readouterr().out
    assert "# on a:" in out and "# on b:" in out and not (tmp_path / "run").exists()


def test_the_shape_is_told_as_json(capsys):
    assert main(["shape", "--site=slurm", "--set=nodes=3"]) == 0
    shape = {"nodes": 3, "processes": 8, "devices": 8, "grace": 30, "chosen": True}
    assert json.loads(capsys.readouterr().out) == shape


@pytest.mark.parametrize(
    ("changes", "here", "seconds"),
    [
        ([], False, 180),
        ([], True, 0),
        (["site.grace=30"], True, 30),
        (["site.grace=900"], False, 180),
        (["time_limit=1h", "signal.before=60"], True, 60),
        (["site.scheduler=none"], False, 0),
    ],
)
def test_what_the_shortest_stop_leaves(changes, here, seconds):
    assert grace(check(load("", "", changes, values={"argv": ["x.py"]})), here=here) == seconds
