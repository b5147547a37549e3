"""The command line as a user meets it: exit codes, messages, and what it does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.cli import start as start_module
from longctx.cli.arguments import make_parser, parse
from longctx.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]


def longctx(*argv, cwd=ROOT, env=None):
    return subprocess.run(
        [sys.executable, "-m", "longctx", *argv],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=50,
    )


def run(capsys, *argv):
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def corpus(tmp_path):
    """Overrides for a folder of small documents, and a place for everything that is written."""
    for number in range(30):
        path = tmp_path / "documents" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {number} says its number " * (5 + number))
    return [
        f"data.path={tmp_path}/documents",
        f"data.cache_dir={tmp_path}/cache",
        f"run.dir={tmp_path}/run",
        "data.held_out=0.2",
        "data.workers=1",
    ]


def test_help_lists_every_verb_that_exists(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)
    assert main([]) == 2


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb):
    done = longctx(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["config", "show", "quickstart"],
        ["config", "check", "quickstart", "--world", "8", "--device", "cuda"],
        ["config", "check", "quickstart"],
    ],
)
def test_what_needs_no_torch_imports_none(argv):
    code = (
        "import sys; from longctx.cli.main import main; code = main(sys.argv[1:]); "
        "print([x for x in ('torch', 'wandb', 'rich', 'launch') if x in sys.modules], file=sys.stderr); "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_help_needs_no_omegaconf_either():
    code = (
        "import sys; from longctx.cli.main import main; main(['--help']); print('omegaconf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown verb trian", "did you mean train"]),
        (["train", "quickstart", "train.stepz=1"], ["train.stepz", "train.steps"]),
        (["train", "quickstart", "parallel.ring=3"], ["parallel.ring=3"]),
        (["train", "quickstart", "data.seq_len=16k"], ["data.seq_len=16k exceeds"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["prepare", "quickstart", "data.path=/no/such/folder"], ["/no/such/folder"]),
        (["config", "check", "quickstart", "--world", "3", "parallel.dp_shard=2"], ["3 processes"]),
        (["config", "check", "quickstart", "--node-ranks", "0"], ["--node-ranks=0"]),
        (["config", "shwo", "quickstart"], ["show or check"]),
        (["train", "quickstart", "run.device=cuda", "run.processes=4"], ["run.device=cpu"]),
    ],
)
def test_bad_input_ends_with_2_and_one_line(capsys, monkeypatch, argv, words):
    monkeypatch.setattr("longctx.cli.machine.visible_gpus", list)
    monkeypatch.chdir(ROOT)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_errors_reach_the_shell():
    done = longctx("train", "quickstart", "train.stepz=1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown key train.stepz (command line); did you mean train.steps?\n"


@pytest.mark.parametrize("argv", [["train"], ["prepare", "quickstart", "--jsn"], ["config", "show", "a=1"]])
def test_a_wrong_option_or_no_file_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_words_come_in_any_order():
    parser = make_parser("x", "")
    parser.add_argument("--json", action="store_true")
    arguments = parse(parser, ["a=1", "f.yaml", "--json", "~b.c", "compose+=m/x", "dir/g=1.yaml", "h"])
    assert arguments.files == ("f.yaml", "dir/g=1.yaml", "h")
    assert arguments.overrides == ("a=1", "~b.c", "compose+=m/x")
    assert arguments.options.json


def test_show_prints_values_and_sources(capsys):
    code, out, _ = run(capsys, "config", "show", "quickstart", "train.steps=5")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert code == 0
    assert rows["train.steps"] == ["5", "command line"]
    assert rows["train.eps"] == ["1e-08", "default"]
    assert rows["model.num_layers"][1].endswith("configs/model/tiny.yaml")
    _, out, _ = run(capsys, "config", "show", "quickstart", "--json", "train.steps=5")
    assert json.loads(out)["train.steps"] == {"value": 5, "source": "command line"}


def test_check_prints_the_layout(capsys):
    code, out, _ = run(capsys, "config", "check", "quickstart", "--world", "8", "--device", "cuda")
    assert code == 0
    assert "ring 2 x ulysses 4" in out
    _, out, _ = run(capsys, "config", "check", "quickstart", "--world=8", "--device=cuda", "--json")
    assert json.loads(out)["parallel"]["ulysses"] == 4
    _, out, _ = run(
        capsys, "config", "check", "quickstart", "--world=8", "--device=cuda", "--node-ranks=2", "--json"
    )
    assert json.loads(out)["parallel"]["ring"] == 4


def test_prepare_prints_the_histogram(capsys, corpus):
    code, out, _ = run(capsys, "prepare", "quickstart", *corpus)
    assert code == 0
    assert "length (tokens)" in out and "held out" in out
    _, out, _ = run(capsys, "prepare", "quickstart", "--json", *corpus)
    row = json.loads(out)
    assert row["train_documents"] + row["held_out_documents"] == 30
    assert sum(each["documents"] for each in row["lengths"]) == 30
    assert sum(each["tokens"] for each in row["lengths"]) == row["tokens"]


def test_train_becomes_the_launcher(capsys, corpus, monkeypatch, tmp_path):
    seen = []

    def execv(path, argv):
        seen.append((path, argv))
        raise SystemExit(0)

    monkeypatch.setattr(start_module.os, "execv", execv)
    monkeypatch.setattr("longctx.cli.machine.visible_gpus", lambda: [24 * 1024**3, 16 * 1024**3])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["train", "quickstart", *corpus, "run.port=0"])
    [(path, argv)] = seen
    assert path == sys.executable
    program = argv[argv.index("--") + 1 :]
    assert argv[1:4] == ["-m", "launch", "local"]
    assert "--set=processes=2" in argv and f"--folder={tmp_path}/run" in argv
    assert program[:4] == ["-m", "longctx", "train", "quickstart"]
    # the workers are told what was found here, so that they resolve to the same layout
    assert program[-2:] == ["run.device=cuda", f"run.device_memory={16 * 1024**3}"]


@pytest.mark.parametrize("trace", ["metrics.jsonl", "ckpt"])
def test_a_folder_that_holds_a_run_is_refused(capsys, corpus, tmp_path, trace):
    (tmp_path / "run" / trace).mkdir(parents=True)
    code, _, err = run(capsys, "train", "quickstart", *corpus)
    assert code == 2
    assert "already holds a run" in err and "run.resume=true" in err


def test_a_run_folder_that_is_a_file_is_refused(capsys, corpus, tmp_path):
    (tmp_path / "run").touch()
    code, _, err = run(capsys, "train", "quickstart", *corpus, "run.resume=true")
    assert code == 2
    assert "is a file" in err


# The console script has its own folder first on the path, `-m` the working folder; workers use `-m`.
CONSOLE_SCRIPT = ["-P", "-c", "from longctx.__main__ import main; main()"]


@pytest.mark.parametrize("starter", [CONSOLE_SCRIPT, ["-m", "longctx"]], ids=["script", "module"])
@pytest.mark.parametrize("intruder", ["launch.py", "parallel/__init__.py"])
def test_another_package_of_the_same_name_is_named(corpus, tmp_path, intruder, starter):
    path = tmp_path / "elsewhere" / intruder
    path.parent.mkdir(parents=True)
    path.touch()
    done = subprocess.run(
        [sys.executable, *starter, "train", "quickstart", *corpus],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr and "Traceback" not in done.stderr


def test_a_taken_port_ends_with_3(corpus):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = longctx("train", "quickstart", *corpus, f"run.port={taken.getsockname()[1]}")
    assert done.returncode == 3, done.stderr
    assert "Address already in use" in done.stderr


def test_launch_local_takes_the_job_and_the_site(capsys, corpus, monkeypatch, tmp_path):
    seen = []

    def execv(path, argv):
        seen.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr(start_module.os, "execv", execv)
    monkeypatch.chdir(ROOT)
    spec = ["--site=workstation", "--set=processes=3", "--set=site.grace=40"]
    with pytest.raises(SystemExit):
        main(["launch", "local", "quickstart", *spec, "--dry-run", *corpus])
    at = seen[0].index("--")
    assert all(each in seen[0][:at] for each in ["local", *spec, "--dry-run", f"--folder={tmp_path}/run"])
    assert {"run.processes=3", "checkpoint.grace_s=40"} <= set(seen[0][at:])
    with pytest.raises(SystemExit) as refused:
        main(["launch", "local", "quickstart", "--set=nodes=2", *corpus])
    assert refused.value.code == 2 and not (tmp_path / "run").exists()


def test_launch_is_the_launcher():
    done = longctx("launch", "local", "--set=processes=2", "--dry-run", "--", "x.py", "y")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("x.py y")
