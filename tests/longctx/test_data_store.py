"""The token store: what is on disk, and that damage is found by name."""

import errno
import json
import os
import struct

import numpy as np
import pytest
from stores import flip_bit, make_store

from longctx.data import files
from longctx.data.index import read_index, token_dtype, write_index
from longctx.data.store import Store, meta_digest, store_prefix
from longctx.errors import DataError

DOCUMENTS = [[5, 6, 7, 256], [256], [1, 2, 256]]


def test_documents_come_back(tmp_path):
    store = make_store(tmp_path / "s", DOCUMENTS)
    assert [store.document(i).tolist() for i in range(len(store))] == DOCUMENTS
    assert store.document(0, 1, 3).tolist() == [6, 7]
    assert store.lengths.tolist() == [4, 1, 3] and store.num_tokens == 8
    assert [store.name(i) for i in range(3)] == ["doc0", "doc1", "doc2"]
    assert store.text_bytes.tolist() == [3, 0, 2] and store.max_token() == 256
    with pytest.raises(IndexError, match=r"tokens 2..5 of document 2, which has 3"):
        store.document(2, 2, 5)


def test_files_on_disk_literally(tmp_path):
    make_store(tmp_path / "s", DOCUMENTS)
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<8H", 5, 6, 7, 256, 256, 1, 2, 256)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    body = struct.pack("<3i", 4, 1, 3) + struct.pack("<3q", 0, 8, 10) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "s.idx").read_bytes() == head + body
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "s.bin",
        "s.documents.npy",
        "s.files.jsonl",
        "s.idx",
        "s.json",
    ]


def test_token_type_follows_the_vocabulary(tmp_path):
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
    store = make_store(tmp_path / "s", [[70000, 3]], vocab_size=70001)
    assert store.document(0).dtype == np.int32 and store.document(0).tolist() == [70000, 3]


def test_token_outside_the_vocabulary_is_never_written(tmp_path):
    with pytest.raises(DataError, match="made id 300, its vocabulary has 257"):
        make_store(tmp_path / "s", [[300, 256]])
    assert list(tmp_path.iterdir()) == []


def test_store_without_documents_is_never_written(tmp_path):
    with pytest.raises(DataError, match="no documents to write"):
        make_store(tmp_path / "s", [])
    assert list(tmp_path.iterdir()) == []


def test_document_longer_than_the_index_can_say_is_refused(tmp_path):
    with (tmp_path / "x").open("wb") as file, pytest.raises(DataError, match="at most 2,147,483,647"):
        write_index(file, np.array([1, 2**31]), np.dtype(np.uint16))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy", ".files.jsonl"])
def test_any_flipped_bit_is_named(tmp_path, suffix):
    store = make_store(tmp_path / "s", DOCUMENTS)
    store.verify("whole")
    path = tmp_path / f"s{suffix}"
    flip_bit(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"s\{suffix}.*prepare.* again"):
        Store(str(tmp_path / "s")).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy", ".files.jsonl"])
def test_truncated_and_missing_files_are_named_on_opening(tmp_path, suffix):
    make_store(tmp_path / "s", DOCUMENTS)
    path = tmp_path / f"s{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"s\{suffix} has {size - 1} bytes instead of {size}"):
        Store(str(tmp_path / "s"))
    path.unlink()
    with pytest.raises(DataError, match=rf"s\{suffix} is missing"):
        Store(str(tmp_path / "s"))


def test_damaged_meta_is_named(tmp_path):
    make_store(tmp_path / "s", DOCUMENTS)
    path = tmp_path / "s.json"
    path.write_text(path.read_text().replace('"tokens": 8', '"tokens": 9'))
    with pytest.raises(DataError, match=r"s.json is damaged: its checksum"):
        Store(str(tmp_path / "s"))
    path.write_text(path.read_text()[:-2])
    with pytest.raises(DataError, match=r"s.json is not readable as JSON"):
        Store(str(tmp_path / "s"))


def test_meta_of_a_newer_program_is_refused(tmp_path):
    meta = dict(make_store(tmp_path / "s", DOCUMENTS).meta) | {"version": 2}
    (tmp_path / "s.json").write_text(json.dumps(meta | {"xxh3_64": meta_digest(meta)}))
    with pytest.raises(DataError, match="version 2, this program reads 1"):
        Store(str(tmp_path / "s"))


def test_pair_without_side_files_is_read_and_its_sizes_checked(tmp_path):
    make_store(tmp_path / "s", DOCUMENTS)
    for suffix in (".json", ".documents.npy", ".files.jsonl"):
        (tmp_path / f"s{suffix}").unlink()
    (tmp_path / "s.json").write_text('{"something": "else"}')
    store = Store(str(tmp_path / "s"))
    store.verify("whole")
    assert store.meta is None and store.text_bytes is None and store.max_token() == 256
    assert store.document(2).tolist() == DOCUMENTS[2] and store.name(2) == "s document 2"
    os.truncate(tmp_path / "s.bin", 15)
    with pytest.raises(DataError, match=r"s.bin has 15 bytes, its index describes 16"):
        Store(str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"X", "does not start with MMIDIDX"),
        (9, b"\2", "version 2 with dtype code 8"),
        (17, b"\6", "version 1 with dtype code 6"),
        (18, b"\4", "4 sequences need"),
        (34, b"\3", "do not follow each other"),
        (74, b"\7", "do not run from 0 to 3"),
    ],
)
def test_inconsistent_index_is_named(tmp_path, place, value, message):
    make_store(tmp_path / "s", DOCUMENTS)
    data = bytearray((tmp_path / "s.idx").read_bytes())
    data[place : place + 1] = value
    (tmp_path / "s.idx").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_index(tmp_path / "s.idx")


def test_damage_is_found_in_its_block_and_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    monkeypatch.setattr("longctx.data.store.BLOCK_BYTES", 64)
    store = make_store(tmp_path / "s", [[n % 256 for n in range(320)]])
    assert len(store.meta["files"][".bin"]["xxh3_64"]) == 10
    flip_bit(tmp_path / "s.bin", 64 * 4 + 3)
    with pytest.raises(DataError, match=r"s.bin is damaged in bytes 256 to 320"):
        store.verify("whole")
    monkeypatch.setattr("longctx.data.store.VERIFY_WHOLE_BYTES", 64 * 4)
    store.verify("auto")  # looks at blocks 0, 3, 6 and 9
    flip_bit(tmp_path / "s.bin", 64 * 6)
    with pytest.raises(DataError, match=r"bytes 384 to 448"):
        store.verify("auto")


def test_prefix_is_recognised_with_and_without_suffix(tmp_path):
    make_store(tmp_path / "s", DOCUMENTS)
    wanted = str(tmp_path / "s")
    assert [store_prefix(wanted + end) for end in ("", ".bin", ".idx")] == [wanted] * 3
    assert store_prefix(str(tmp_path)) is None and store_prefix("python-stdlib") is None
    (tmp_path / "s.idx").unlink()
    with pytest.raises(DataError, match=r"s.idx is missing"):
        store_prefix(wanted)


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    message = r"the disk is full while writing .*file .*data.cache_dir"
    with pytest.raises(DataError, match=message), files.data_file(path) as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(OSError, match="Input/output"), files.data_file(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error")
    assert list(tmp_path.iterdir()) == []
