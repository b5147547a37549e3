"""Background saves, what is kept, other places, packing, the command line, released formats."""

import errno
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.checkpoint.shares import run_tensors
from longctx.cli.main import main
from longctx.errors import CheckpointError
from longctx.tensors import folder as folders
from longctx.tensors.fill import raw_bytes, read_tensor
from longctx.train.step import train_step

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saver")
    write_corpus(folder / "docs")
    return folder


def open_run(base, name: str, rank: int, size: int, *extra: str):
    (base / name).mkdir(exist_ok=True)
    config = make_config(base, name, size=size, layout={"dp_shard": size}, extra=extra)
    return build(config, make_world(base / name, rank, size))


def hashes(run) -> dict[str, str]:
    tensors = {
        name: each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in run_tensors(run).items()
    }
    return {
        name: xxhash.xxh3_64_hexdigest(raw_bytes(each.contiguous())) for name, each in sorted(tensors.items())
    }


def train_behind_a_save(rank: int, size: int, base) -> tuple[bool, bool, int]:
    run = open_run(base, "behind", rank, size)
    train_step(run, 1e-3)
    before, seen = hashes(run), run.watch.state()
    saver = checkpoint.Saver(run)
    path = saver.save(background=True)
    train_step(run, 1e-3)
    after = hashes(run)
    saver.wait()
    checkpoint.load(path, run)
    same = hashes(run) == before != after and run.watch.state() == seen != []
    run.close()
    return same, run.progress.step == 1, len(checkpoint.list_checkpoints(base / "behind" / "ckpt"))


def test_a_background_save_holds_the_state_of_its_step(base):
    assert run_ranks(train_behind_a_save, 2, base, init=False) == [(True, True, 1)] * 2


def fail_behind(rank: int, size: int, base) -> tuple[str, list[str]]:
    run = open_run(base, "fails", rank, size)
    saver = checkpoint.Saver(run)
    saver.save()
    run.progress.step += 1
    if rank == 1:

        def full(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        folders.atomic_file = full
    saver.save(background=True)
    run.progress.step += 1
    try:
        saver.save(background=True)
        message = ""
    except CheckpointError as error:
        message = str(error)
    left = sorted(path.name for path in (base / "fails" / "ckpt").iterdir())
    run.close()
    return message, left


def test_a_background_failure_is_told_to_all_at_the_next_save(base):
    for message, left in run_ranks(fail_behind, 2, base, init=False):
        assert "rank 1" in message and "No space left" in message and "step-00000000" in message
        assert left == ["step-00000000"]


def keep_some(rank: int, size: int, base) -> list[str]:
    extra = ("checkpoint.keep=2", "checkpoint.milestone_every=3", "checkpoint.codec=zstd")
    run = open_run(base, "kept", rank, size, *extra)
    saver = checkpoint.Saver(run)
    for step in range(1, 9):
        run.progress.step = step
        saver.save(background=True)
    saver.wait()
    run.close()
    return [path.name for path in checkpoint.list_checkpoints(base / "kept" / "ckpt")]


def test_the_latest_and_milestones_are_kept_and_the_command_line_looks_after_them(base, capsys):
    steps = [3, 6, 7, 8]
    assert run_ranks(keep_some, 1, base, init=False)[0] == [f"step-{step:08d}" for step in steps]
    run = str(base / "kept")
    assert main(["ckpt", "ls", run, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows] == steps and all(row["ratio"] > 1.0 for row in rows)
    assert main(["ckpt", "verify", run]) == 0
    assert main(["ckpt", "prune", run, "--keep", "1", "--milestone-every", "6", "--dry-run"]) == 0
    assert main(["ckpt", "prune", run, "--keep", "1", "--milestone-every", "6", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(path).name for path in row["kept"]] == ["step-00000006", "step-00000008"]
    newest = base / "kept" / "ckpt" / "step-00000008" / "rank-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    assert main(["ckpt", "verify", run]) == 1
    assert "rank-0.safetensors" in capsys.readouterr().out
    assert main(["ckpt", "prune", run, "--keep", "1"]) == 1, "the last good one is not removed"
    assert len(checkpoint.list_checkpoints(base / "kept" / "ckpt")) == 2
    assert main(["ckpt", "ls", str(base / "docs")]) == 2
    assert "no checkpoints" in capsys.readouterr().err


def keep_away(rank: int, size: int, base) -> str:
    from longctx.recovery.members import Fixed
    from longctx.train.loop import train

    extra = (f"checkpoint.dir={base / 'other-disk'}", "train.steps=2", "train.eval_every=0")
    (base / "away").mkdir()
    train(make_config(base, "away", extra=extra), Fixed(make_world(base / "away", rank, size)))
    return ""


def test_a_run_whose_checkpoints_lie_elsewhere_is_found_by_its_name(base, capsys):
    run_ranks(keep_away, 1, base, init=False)
    assert not (base / "away" / "ckpt").exists()
    assert main(["ckpt", "verify", str(base / "away")]) == 0
    capsys.readouterr()
    assert main(["sample", str(base / "away"), "--prompt", "long ", "--max-new", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["source"] == str(base / "other-disk" / "step-00000002") and found["prompt_tokens"] == 5


def elsewhere(rank: int, size: int, base) -> tuple[bool, str, list[str]]:
    import fsspec

    run = open_run(base, "remote", rank, size, "checkpoint.dir=memory://bucket/run", "checkpoint.keep=1")
    saver = checkpoint.Saver(run)
    for _ in range(2):
        train_step(run, 1e-3)
        saver.save(background=True)
    saver.wait()
    before = hashes(run)
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/run/step-00000009/rank-0.safetensors", b"an upload that was cut short")
    train_step(run, 1e-3)
    found = checkpoint.resume(run, "memory://bucket/run")
    names = [str(path) for path in checkpoint.list_checkpoints("memory://bucket/run")]
    same = hashes(run) == before
    run.close()
    return same, str(found), names


def test_checkpoints_behind_a_url(base):
    same, found, names = run_ranks(elsewhere, 1, base, init=False)[0]
    assert same and names == [found] and found == "memory://bucket/run/step-00000002"


def test_unknown_protocols_are_refused():
    with pytest.raises(ValueError, match="nonsense://"):
        folders.folder_at("nonsense://bucket")


def read_only(rank: int, size: int, base) -> str:
    run = open_run(base, "locked", rank, size)

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(base / "locked"))

    folders.Path.mkdir = refuse
    try:
        checkpoint.save(run)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_read_only_target_is_named(base):
    message = run_ranks(read_only, 1, base, init=False)[0]
    assert "Permission denied" in message and "locked" in message and "last good checkpoint: none" in message


@pytest.fixture(scope="module")
def fixture():
    return FIXTURES / "checkpoint-format-2" / "step-00000003"


def test_a_checkpoint_of_released_format_2_loads(fixture):
    checkpoint.verify(fixture)
    opened = checkpoint.open_checkpoint(fixture)
    expected = json.loads((fixture.parent / "expected.json").read_text())
    assert expected.keys() == opened.index.tensors.keys()
    for name, digest in expected.items():
        assert xxhash.xxh3_64_hexdigest(raw_bytes(read_tensor(opened.index, name))) == digest, name


def test_another_format_is_refused_with_the_way_out(fixture, tmp_path):
    copy = shutil.copytree(fixture, tmp_path / "step-00000003")
    manifest = json.loads((copy / "manifest.json").read_text()) | {"format": 1}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"format 1, this version reads 2.*longctx export"):
        checkpoint.verify(copy)


def test_any_flipped_bit_in_any_file_is_found(fixture, tmp_path):
    copy = shutil.copytree(fixture, tmp_path / "step-00000003")
    chooser = random.Random(0)
    files = sorted(path for path in copy.iterdir() if path.is_file())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                checkpoint.verify(copy)
        path.write_bytes(content)
    checkpoint.verify(copy)


def test_torch_is_not_needed_to_pick_the_bytes_apart(fixture):
    from safetensors import safe_open

    with safe_open(fixture / "rank-0.safetensors", "pt") as file:
        part = file.get_tensor("model.embedding.weight")
    whole = read_tensor(checkpoint.open_checkpoint(fixture).index, "model.embedding.weight")
    assert torch.equal(whole[: len(part)], part)
