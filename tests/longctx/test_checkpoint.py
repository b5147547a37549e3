"""Checkpoints: resumed runs, other layouts, every kind of damage, nothing half-written."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from ranks import run_ranks
from tiny import LAYOUTS, make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.errors import CheckpointError, ConfigError
from longctx.recovery.members import Fixed
from longctx.tensors import folder
from longctx.train.loop import train
from longctx.train.step import train_step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_corpus(folder / "docs")
    return folder


def train_rank(rank: int, size: int, base, name: str, layout: dict, extra: tuple[str, ...]) -> int:
    config = make_config(base, name, size=size, layout=layout, extra=extra)
    return train(config, Fixed(make_world(base / name, rank, size)))


def run_layout(base, name: str, layout: str, *extra: str) -> list[dict]:
    size, degrees = LAYOUTS[layout]
    (base / name).mkdir(exist_ok=True)
    (base / name / "rendezvous").unlink(missing_ok=True)
    assert run_ranks(train_rank, size, base, name, degrees, extra, init=False) == [0] * size
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(base):
    return run_layout(base, "whole", "ulysses2", "train.steps=6", "checkpoint.every=3", "checkpoint.keep=9")


def copy_at_step_3(base, name: str) -> None:
    """A run folder as a kill after step 3's checkpoint, in the middle of step 5, leaves it."""
    shutil.copytree(base / "whole", base / name)
    shutil.rmtree(base / name / "ckpt" / "step-00000006")
    lines = (base / name / "metrics.jsonl").read_text().splitlines()
    (base / name / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])


def test_resumed_run_is_bit_identical(base, uninterrupted):
    copy_at_step_3(base, "same")
    rows = run_layout(base, "same", "ulysses2", "train.steps=6", "run.resume=true")
    exact = ("step", "tokens", "loss", "grad_norm", "lr", "held_out_loss")
    assert [[row.get(key) for key in exact] for row in rows] == [
        [row.get(key) for key in exact] for row in uninterrupted
    ]


@pytest.mark.parametrize(
    "layout", ["shard2-ring2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("one", "ring2"))]
)
def test_resumed_with_another_world_size_or_layout_stays_within_tolerance(base, uninterrupted, layout):
    copy_at_step_3(base, f"to-{layout}")
    rows = run_layout(base, f"to-{layout}", layout, "train.steps=6", "run.resume=true")
    assert losses(rows) == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert losses(rows)[:3] == losses(uninterrupted)[:3]


@pytest.mark.parametrize("damage", ["flip", "manifest"])
def test_resume_without_a_good_checkpoint_is_an_error_and_changes_nothing(base, uninterrupted, damage):
    name = f"all-damaged-{damage}"
    shutil.copytree(base / "whole", base / name)
    for each in (base / name / "ckpt").iterdir():
        if damage == "manifest":
            (each / "manifest.json").unlink()
            continue
        content = bytearray((each / "rank-0.safetensors").read_bytes())
        content[-5] ^= 1
        (each / "rank-0.safetensors").write_bytes(content)
    before = (base / name / "metrics.jsonl").read_text()
    size, degrees = LAYOUTS["ulysses2"]
    (base / name / "rendezvous").unlink()
    codes = run_ranks(train_rank, size, base, name, degrees, ("run.resume=true",), init=False)
    assert codes == [1, 1]
    assert (base / name / "metrics.jsonl").read_text() == before
    error = json.loads((base / name / "summary.json").read_text())["error"]
    assert "none of the 2 checkpoints" in error and "step-00000006" in error and "run.dir" in error


def test_resume_passes_over_a_damaged_checkpoint(base, uninterrupted):
    shutil.copytree(base / "whole", base / "newest-damaged")
    file = base / "newest-damaged" / "ckpt" / "step-00000006" / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (base / "newest-damaged" / "ckpt" / ".step-00000009.partial").mkdir()
    rows = run_layout(base, "newest-damaged", "ulysses2", "train.steps=6", "run.resume=true")
    assert losses(rows) == losses(uninterrupted)
    events = (base / "newest-damaged" / "events.jsonl").read_text().splitlines()
    starts = [event for event in map(json.loads, events) if event["kind"] == "start"]
    assert starts[-1]["step"] == 3 and starts[-1]["resumed_from"].endswith("step-00000003")
    assert not (base / "newest-damaged" / "ckpt" / ".step-00000009.partial").exists()


def test_no_pickle_and_a_manifest_of_everything(base, uninterrupted):
    folder = checkpoint.latest_good(base / "whole" / "ckpt")
    names = {path.name for path in folder.iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    manifest = checkpoint.verify(folder)
    assert set(manifest["files"]) | {"manifest.json"} == names
    assert manifest["tensors"]["model.layers.1.attention.wk.weight"]["shape"] == [16, 32]
    assert "optim.norm.weight.exp_avg_sq" in manifest["tensors"]


def damaged(base, tmp_path, name: str):
    """A copy of both checkpoints, and one file of the newer to damage."""
    shutil.copytree(base / "whole" / "ckpt", tmp_path / "ckpt")
    newest = tmp_path / "ckpt" / "step-00000006"
    found = sorted(newest.glob(name))
    assert found
    return tmp_path / "ckpt", found[0]


@pytest.mark.parametrize("name", ["*.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_checkpoint_before_is_used(
    base, uninterrupted, tmp_path, name, damage, capsys
):
    folder, file = damaged(base, tmp_path, name)
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        checkpoint.verify(file.parent)
    assert checkpoint.latest_good(folder).name == "step-00000003"
    # Without its manifest a folder never counted as a checkpoint, so there is nothing to warn of.
    assert (file.name in capsys.readouterr().out) == (not (name == "manifest.json" and damage == "delete"))


def load_other_model(rank: int, size: int, base, extra: tuple[str, ...]) -> str:
    config = make_config(base, "other", extra=extra)
    (base / "other" / "rendezvous").unlink(missing_ok=True)
    run = build(config, make_world(base / "other", rank, size))
    try:
        checkpoint.load(base / "whole" / "ckpt" / "step-00000006", run)
    except ConfigError as error:
        return str(error)
    finally:
        run.close()
    return ""


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("model.ffn_size=64",), ["model.ffn_size=64", "have 48"]),
        (("model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=4"), ["model.num_heads=8", "have 4"]),
    ],
)
def test_another_model_is_refused_by_the_first_key_that_differs(base, uninterrupted, extra, words):
    (base / "other").mkdir(exist_ok=True)
    message = run_ranks(load_other_model, 1, base, extra, init=False)[0]
    assert all(word in message for word in (*words, "step-00000006")), message


def save_on_full_disk(rank: int, size: int, base) -> tuple[str, list[str]]:
    """Rank 1's writes fail from the second checkpoint on."""
    config = make_config(base, "full", size=size, layout={"dp_shard": size})
    run = build(config, make_world(base / "full", rank, size))
    train_step(run, 1e-4)
    checkpoint.save(run)
    train_step(run, 1e-4)
    if rank == 1:

        def full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        folder.atomic_file = full
    try:
        checkpoint.save(run)
        message = ""
    except CheckpointError as error:
        message = str(error)
    run.close()
    return message, sorted(p.name for p in (base / "full" / "ckpt").iterdir())


def test_a_full_disk_on_one_rank_fails_every_rank_and_keeps_the_previous_checkpoint(base):
    (base / "full").mkdir()
    for message, left in run_ranks(save_on_full_disk, 2, base, init=False):
        assert "rank 1" in message and "No space left" in message and "step-00000001" in message
        assert left == ["step-00000001"]
    checkpoint.verify(base / "full" / "ckpt" / "step-00000001")


def save_beyond_the_file_limit(rank: int, size: int, base) -> tuple[str, list[str]]:
    """The operating system cuts rank 1's tensor file short in the middle of the write."""
    config = make_config(base, "limit", size=size, layout={"dp_shard": size})
    run = build(config, make_world(base / "limit", rank, size))
    checkpoint.save(run)
    train_step(run, 1e-4)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run)
        message = ""
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.close()
    return message, sorted(p.name for p in (base / "limit" / "ckpt").iterdir())


def test_a_write_cut_short_fails_every_rank_and_keeps_the_previous_checkpoint(base):
    (base / "limit").mkdir()
    for message, left in run_ranks(save_beyond_the_file_limit, 2, base, init=False):
        assert "writing tensors" in message and "step-00000000" in message
        assert left == ["step-00000000"]
    checkpoint.verify(base / "limit" / "ckpt" / "step-00000000")


def not_enough_space(rank: int, size: int, base) -> str:
    config = make_config(base, "space")
    run = build(config, make_world(base / "space", rank, size))
    folder.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)
    try:
        checkpoint.save(run)
    except CheckpointError as error:
        return str(error)
    finally:
        run.close()
    return ""


def test_free_space_is_checked_before_writing(base):
    (base / "space").mkdir()
    message = run_ranks(not_enough_space, 1, base, init=False)[0]
    assert "GiB free" in message and "checkpoint.dir" in message


def save_and_prune(rank: int, size: int, base) -> list[str]:
    config = make_config(base, "prune", extra=("checkpoint.keep=2",))
    run = build(config, make_world(base / "prune", rank, size))
    for _ in range(4):
        train_step(run, 1e-4)
        checkpoint.save(run)
    run.close()
    return [path.name for path in checkpoint.list_checkpoints(base / "prune" / "ckpt")]


def test_only_the_latest_are_kept(base):
    (base / "prune").mkdir()
    assert run_ranks(save_and_prune, 1, base, init=False)[0] == ["step-00000003", "step-00000004"]


def rng_round_trip(rank: int, size: int, base) -> bool:
    config = make_config(base, "rng", size=size, layout={"dp_shard": size})
    run = build(config, make_world(base / "rng", rank, size))
    torch.manual_seed(100 + rank)
    path = checkpoint.save(run)
    expected = torch.rand(3)
    torch.manual_seed(0)
    checkpoint.load(path, run)
    same = torch.equal(torch.rand(3), expected)
    run.close()
    return same


def test_every_rank_gets_its_random_state_back(base):
    (base / "rng").mkdir()
    assert run_ranks(rng_round_trip, 2, base, init=False) == [True, True]
