"""Preparation that is killed, stopped, raced or out of disk: nothing is lost, nothing half-written."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from preparing import processes_of, start_prepare, stop_group, wait_for
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from longctx.config.schema import DataConfig
from longctx.data import shards, writer
from longctx.data.prepare import prepare
from longctx.data.store import Store
from longctx.errors import DataError

SUFFIXES = (".bin", ".idx", ".json", ".documents.npy", ".files.jsonl")
CHUNK = 1 << 15


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 5 MB and a tokenizer slow enough to be interrupted; the folder also holds the finished store."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"w{n * 7919 % 5000}" for n in range(4000)]
    (folder / "docs").mkdir()
    line = json.dumps({"text": " ".join(words)}) + "\n"
    (folder / "docs" / "a.jsonl").write_text(line * 600)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    prepared = prepare(DataConfig(**options(folder, "whole")), progress=False)
    return folder, files_of(prepared.prefix)


def options(folder, cache) -> dict:
    return {
        "path": str(folder / "docs"),
        "tokenizer": str(folder / "tokenizer.json"),
        "cache_dir": str(folder / cache),
        "workers": 2,
    }


def files_of(prefix: str) -> dict[str, bytes]:
    return {suffix: open(prefix + suffix, "rb").read() for suffix in SUFFIXES}


def finished(folder) -> list:
    return list(folder.glob("*.work-*/*.npz"))


def interrupted(corpus, cache, number):
    """Start, wait for a few chunks, signal; returns what the process said."""
    folder = corpus[0]
    process = start_prepare(folder, options(folder, cache), chunk_bytes=CHUNK)
    wait_for(lambda: len(finished(folder / cache)) >= 10 or process.poll() is not None, "first chunks")
    if number == signal.SIGKILL:
        process.kill()  # it alone: the processes it started must notice by themselves
    else:
        stop_group(process, number)
    out, err = process.communicate(timeout=30)
    wait_for(lambda: not processes_of(folder), "end of all processes")
    return process.returncode, out, err


def resume_and_compare(corpus, cache):
    folder, wanted = corpus
    kept = {path: path.stat().st_mtime_ns for path in finished(folder / cache)}
    assert 10 <= len(kept) < 420 and not list((folder / cache).glob("*.json"))
    made = []
    original = shards.save_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "longctx.data.workers.save_shard", lambda path, s: made.append(path) or original(path, s)
        )
        config = DataConfig(**options(folder, cache) | {"workers": 1})
        prepared = prepare(config, progress=False, chunk_bytes=CHUNK)
    assert made and not kept.keys() & set(made), "a finished chunk was made again"
    assert files_of(prepared.prefix) == wanted
    left = {path.name for path in (folder / cache).iterdir()}
    assert not [name for name in left if "work" in name or "tmp" in name]


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(corpus):
    code, _, _ = interrupted(corpus, "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL
    resume_and_compare(corpus, "killed")


def test_control_c_stops_everything_and_keeps_finished_chunks(corpus):
    code, out, err = interrupted(corpus, "stopped", signal.SIGINT)
    assert code == -signal.SIGINT and out == ""
    assert "interrupted; finished chunks are kept" in err
    assert err.count("Traceback") == 1, err  # the caller's own; none from the other processes
    assert not list((corpus[0] / "stopped").rglob("*.tmp"))
    resume_and_compare(corpus, "stopped")


def test_two_at_once_work_once(corpus):
    folder, wanted = corpus
    both = [start_prepare(folder, options(folder, "raced"), chunk_bytes=CHUNK) for _ in range(2)]
    said = [process.communicate(timeout=40) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    results = [json.loads(out) for out, _ in said]
    assert sorted(result["created"] for result in results) == [False, True]
    assert files_of(results[0]["prefix"]) == wanted
    assert not results[0]["torch"] and not results[1]["torch"], "prepare must not import torch"
    waiting = said[0 if results[1]["created"] else 1][1]
    assert "tokenizing" not in waiting


def full_disk(calls: int, original):
    """`original`, until the disk is full."""
    left = [calls]

    def write(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    return write


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [(os, "fsync", 3), (np, "save", 0), (writer, "write_index", 0), (Path, "mkdir", 1)],
)
def test_full_disk_is_named_and_leaves_no_half_store(tmp_path, monkeypatch, module, name, calls):
    (tmp_path / "docs").mkdir()
    for number in range(6):
        (tmp_path / "docs" / f"{number}.txt").write_text(f"text {number}")
    config = DataConfig(path=str(tmp_path / "docs"), cache_dir=str(tmp_path / "cache"), workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full_disk(calls, getattr(module, name)))
        with pytest.raises(DataError, match=r"the disk is full while writing .*cache.* data.cache_dir"):
            prepare(config, progress=False, chunk_bytes=1)
    assert not list((tmp_path / "cache").rglob("*.tmp")) and not list((tmp_path / "cache").glob("*.json"))
    assert len(Store(prepare(config, progress=False, chunk_bytes=1).prefix)) == 6


def test_process_that_dies_is_named(corpus):
    folder = corpus[0]
    process = start_prepare(folder, options(folder, "died"), chunk_bytes=CHUNK)
    wait_for(lambda: len(finished(folder / "died")) >= 2, "first chunks")
    victims = [pid for pid in processes_of(folder) if is_worker(pid, process.pid)]
    os.kill(victims[0], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "DataError: the process that tokenized a.jsonl died (exit code -9" in err
    wait_for(lambda: not processes_of(folder), "end of all processes")


def is_worker(pid: int, main: int) -> bool:
    """Whether a process holds a tokenizer: a child of the fork server, which is a child of the main one."""
    with open(f"/proc/{pid}/stat") as file:
        parent = int(file.read().rsplit(")", 1)[1].split()[1])
    return pid != main and parent != main
