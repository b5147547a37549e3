"""`longctx plan --schedule`: a picture without torch, and what it refuses."""

import subprocess
import sys

import pytest

from longctx.cli.main import main

PIPELINE = ["quickstart", "run.device=cpu", "parallel.ring=1", "parallel.ulysses=1"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"])
def test_every_schedule_is_drawn_with_its_bubble(tmp_path, capsys, schedule):
    picture = tmp_path / "new" / "picture.png"
    words = ["parallel.pp=2", f"pipeline.schedule={schedule}", "--world=2", "--microbatches=4"]
    assert main(["plan", *PIPELINE, *words, f"--schedule={picture}"]) == 0
    said = capsys.readouterr().out
    assert f"{schedule}, 2 ranks, layers" in said and "bubble" in said
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000


def test_slices_and_few_microbatches_are_said(tmp_path, capsys):
    words = ["parallel.pp=4", "--world=4", "--microbatches=1", f"--schedule={tmp_path / 'p.png'}"]
    assert main(["plan", *PIPELINE, *words]) == 0
    assert "bubble 75.0% (formula 75.0%), at most 1 stage inputs kept; fewer microbatches" in (
        capsys.readouterr().out
    )
    assert main(["plan", *PIPELINE, *words, "pipeline.slices=16"]) == 0
    assert "1 microbatches x 16 slices\nbubble 15.8%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,error",
    [
        (["--schedule=a.png"], "parallel.pp=1 has no schedule"),
        (["parallel.pp=2", "--schedule=a.jpg"], "is no PNG"),
        (["parallel.pp=2", "--microbatches=-1", "--schedule=a.png"], "choose at least 1"),
        (["parallel.pp=2", "pipeline.schedule=2f2b", "--schedule=a.png"], "pipeline.schedule"),
    ],
)
def test_bad_requests_are_refused(capsys, words, error):
    assert main(["plan", *PIPELINE, "--world=2", *words]) == 2
    assert error in capsys.readouterr().err


def test_planning_does_not_import_torch():
    code = "import sys, longctx.cli.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
