"""Preparation: what it makes, that it is found again, what it says about bad input."""

import gzip
import json
import os
import random

import numpy as np
import pytest
from stores import flip_bit

from longctx.config.schema import DataConfig
from longctx.data.prepare import describe, prepare
from longctx.data.store import Store
from longctx.data.tokenizers import load_tokenizer
from longctx.errors import ConfigError, DataError

WORDS = ["ring", "shard", "token", "\u00fcber", "context", "\n"]


def write_texts(folder, count=30, seed=0) -> dict[str, str]:
    chooser = random.Random(seed)
    texts = {
        f"d{n:02d}.txt": " ".join(chooser.choices(WORDS, k=chooser.randint(1, 80))) for n in range(count)
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


def config(tmp_path, **more) -> DataConfig:
    options = {"path": str(tmp_path / "docs"), "cache_dir": str(tmp_path / "cache"), "workers": 1}
    return DataConfig(**options | more)


def run(tmp_path, *, chunk_bytes=None, **more):
    return prepare(config(tmp_path, **more), progress=False, chunk_bytes=chunk_bytes)


def texts_of(prefix: str) -> dict[str, str]:
    store, tokenizer = Store(prefix), load_tokenizer("bytes")
    return {store.name(i): tokenizer.decode(store.document(i).tolist()) for i in range(len(store))}


def files_of(prefix: str) -> dict[str, bytes]:
    suffixes = (".bin", ".idx", ".json", ".documents.npy", ".files.jsonl")
    return {suffix: open(prefix + suffix, "rb").read() for suffix in suffixes}


def test_folder_becomes_documents_that_end_with_eos(tmp_path):
    texts = write_texts(tmp_path / "docs")
    prepared = run(tmp_path)
    store = Store(prepared.prefix)
    assert texts_of(prepared.prefix) == texts
    assert all(store.document(i)[-1] == 256 for i in range(len(store)))
    assert store.text_bytes.tolist() == [len(text.encode()) for text in texts.values()]
    assert prepared.num_tokens == sum(len(text.encode()) + 1 for text in texts.values())
    assert (prepared.vocab_size, prepared.tokenizer, prepared.created) == (257, "bytes", True)
    assert sorted([*prepared.train_docs, *prepared.held_out_docs]) == list(range(30))


def test_only_the_store_and_its_lock_remain(tmp_path):
    write_texts(tmp_path / "docs")
    prefix = run(tmp_path).prefix
    names = {str(path) for path in (tmp_path / "cache").iterdir()}
    assert names == {prefix + suffix for suffix in (*files_of(prefix), ".lock")}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [150, 900, 10**6])
def test_store_does_not_depend_on_processes_or_chunks(tmp_path, workers, chunk_bytes):
    write_texts(tmp_path / "docs", 8)
    lines = [json.dumps({"text": f"line {n} " * n}) for n in range(20)]
    (tmp_path / "docs" / "more.jsonl").write_text("\n".join(lines))
    (tmp_path / "docs" / "most.jsonl.gz").write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    wanted = run(tmp_path, cache_dir=str(tmp_path / "other"))
    found = run(tmp_path, workers=workers, chunk_bytes=chunk_bytes)
    assert files_of(found.prefix) == files_of(wanted.prefix)
    names = list(texts_of(found.prefix))
    assert names[8:10] == ["more.jsonl:2", "more.jsonl:3"] and names[-1] == "most.jsonl.gz:19"


def test_second_call_finds_the_store_without_reading_the_documents(tmp_path, monkeypatch):
    write_texts(tmp_path / "docs")
    first = run(tmp_path)
    monkeypatch.setattr("longctx.data.prepare.assemble", None)
    monkeypatch.setattr("longctx.data.chunks._read_text", None)
    again = run(tmp_path)
    assert not again.created and again.prefix == first.prefix
    assert np.array_equal(again.train_docs, first.train_docs)


def test_changed_documents_and_tokenizers_make_another_store(tmp_path):
    write_texts(tmp_path / "docs")
    prefixes = [run(tmp_path).prefix]
    (tmp_path / "docs" / "new.txt").write_text("new")
    prefixes.append(run(tmp_path).prefix)
    os.utime(tmp_path / "docs" / "new.txt", ns=(1, 1))
    prefixes.append(run(tmp_path).prefix)
    assert len(set(prefixes)) == 3
    assert run(tmp_path, seq_len=64, held_out=0.5).prefix == prefixes[-1]


def test_split_is_a_matter_of_opening_not_of_tokenizing(tmp_path):
    write_texts(tmp_path / "docs")
    few, many = run(tmp_path, held_out=0.1), run(tmp_path, held_out=0.4)
    assert 0 < len(few.held_out_docs) < len(many.held_out_docs)
    assert set(few.held_out_docs.tolist()) < set(many.held_out_docs.tolist())
    assert len(run(tmp_path, held_out=0.0).held_out_docs) == 0


def test_a_prepared_prefix_is_a_path_too(tmp_path):
    write_texts(tmp_path / "docs")
    prefix = run(tmp_path).prefix
    again = run(tmp_path, path=prefix + ".bin", cache_dir="/nowhere")
    assert again.prefix == prefix and not again.created


def test_bad_files_are_counted_and_named(tmp_path):
    write_texts(tmp_path / "docs", 2)
    (tmp_path / "docs" / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "docs" / "z.jsonl").write_text('{"text": "fine"}\n' * 30 + "{torn\n")
    prepared = run(tmp_path, chunk_bytes=64)
    assert prepared.num_skipped == 2 and len(Store(prepared.prefix)) == 32
    assert prepared.skipped[0] == "image.png: binary (it holds zero bytes)"
    assert prepared.skipped[1].startswith("z.jsonl:31: not JSON (")
    assert "2 files or lines skipped" in describe(prepared, 64)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_input_is_an_error_if_so_configured(tmp_path, suffix):
    data = b'{"text": "fine"}\n' * 30 + b"{torn\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / f"z.{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    message = rf"z.{suffix}:31: not JSON .*; repair or remove it, or set data.bad_files=skip"
    with pytest.raises(DataError, match=message):
        run(tmp_path, bad_files="error", chunk_bytes=64)
    assert run(tmp_path, chunk_bytes=64).created
    with pytest.raises(DataError, match=message):
        run(tmp_path, bad_files="error")


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.jsonl").write_text('{"body": "x"}\n' * 5)
    with pytest.raises(
        DataError, match=r'5 files or lines .* no text under "text" \(data.text_key\).* has body'
    ):
        run(tmp_path)
    (tmp_path / "docs" / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no text; put documents into it"):
        run(tmp_path)


def test_damaged_store_is_named(tmp_path):
    write_texts(tmp_path / "docs")
    prepared = run(tmp_path)
    flip_bit(tmp_path / "cache" / (prepared.prefix.rsplit("/", 1)[1] + ".bin"), 40)
    with pytest.raises(DataError, match=r"\.bin is damaged in bytes 0 to .* run `longctx prepare` again"):
        run(tmp_path)


def test_damaged_chunk_is_made_again(tmp_path):
    write_texts(tmp_path / "docs", 4)
    (tmp_path / "docs" / "z.bad").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"z.bad: binary"):
        run(tmp_path, bad_files="error", chunk_bytes=1)
    (shard,) = (tmp_path / "cache").glob("*.work-1/00000001.npz")
    flip_bit(shard, shard.stat().st_size // 2)
    with pytest.raises(DataError, match=r"00000001.npz was damaged .* run the same command again"):
        run(tmp_path, chunk_bytes=1)
    assert not shard.exists()
    assert len(Store(run(tmp_path, chunk_bytes=1).prefix)) == 4


def test_store_of_another_tokenizer_is_refused(tmp_path):
    from stores import make_store

    make_store(tmp_path / "s", [[1, 2]], fingerprint="other")
    with pytest.raises(DataError, match=r"made with the tokenizer bytes, data.tokenizer=bytes is another"):
        run(tmp_path, path=str(tmp_path / "s"))


def test_impossible_values_are_instructions(tmp_path):
    with pytest.raises(ConfigError, match=r"data.held_out=1.5 is not a fraction"):
        run(tmp_path, held_out=1.5)
    write_texts(tmp_path / "docs", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir=.*file/x cannot be created"):
        run(tmp_path, cache_dir=str(tmp_path / "file" / "x"))


def test_unreadable_tokenizer_is_named_before_any_process_starts(tmp_path):
    write_texts(tmp_path / "docs")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read by the tokenizers library"):
        run(tmp_path, tokenizer=str(tmp_path), workers=2, chunk_bytes=100)


def test_plain_lines_of_progress_without_a_terminal(tmp_path, capsys):
    write_texts(tmp_path / "docs", 3)
    prepare(config(tmp_path))
    out, err = capsys.readouterr()
    assert out == "" and "tokenizing" in err and "(100%)" in err
