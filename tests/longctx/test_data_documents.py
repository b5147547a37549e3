"""Sources: what is listed, in which order, how it is read, and what is said about bad input."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from longctx.data.chunks import Document, Skip, cut_source, lines_before, read_chunk
from longctx.data.documents import open_source
from longctx.errors import DataError


def read_all(path, *, text_key="text", chunk_bytes=1 << 20):
    """(file name, line in its chunk, text or reason) of everything in a source."""
    source = open_source(str(path), text_key)
    found = []
    for chunk in cut_source(source, chunk_bytes):
        for item in read_chunk(chunk, text_key)[0]:
            content = item.text if isinstance(item, Document) else item.reason
            found.append((source.files[item.file].name, item.line, content))
    return found


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_folder_is_read_recursively_in_name_order_without_hidden_files(tmp_path):
    for name, text in [("b.txt", "two"), ("a/z.md", "one"), ("c", "three"), (".git/x", "no"), ("a/.y", "no")]:
        write(tmp_path / name, text)
    assert read_all(tmp_path) == [("a/z.md", 0, "one"), ("b.txt", 0, "two"), ("c", 0, "three")]


def test_cache_folder_inside_the_source_is_left_out(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "cache" / "store.bin", b"\0\1")
    source = open_source(str(tmp_path), leave_out=tmp_path / "cache")
    assert [file.name for file in source.files] == ["a.txt"]


def test_text_and_json_lines_in_one_folder_are_each_read_as_what_they_are(tmp_path):
    write(tmp_path / "a.txt", "plain")
    write(tmp_path / "b.jsonl", '{"text": "first"}\n\n{"text": "second"}')
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "third"}\n'))
    write(tmp_path / "d.txt", "last")
    assert read_all(tmp_path) == [
        ("a.txt", 0, "plain"),
        ("b.jsonl", 1, "first"),
        ("b.jsonl", 3, "second"),
        ("c.jsonl.gz", 1, "third"),
        ("d.txt", 0, "last"),
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("ending", ["\n", ""])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_give_the_same_documents_whatever_the_chunks(tmp_path, chunk_bytes, ending, suffix):
    texts = ["x" * n for n in (3, 0, 50, 1, 1, 200, 7)] + ["a\nb\r\nc", "\u2028 \u00fc"]
    data = ("\n".join(json.dumps({"text": text}) for text in texts) + ending).encode()
    path = write(tmp_path / f"docs{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    source = open_source(str(path))
    found, lines = [], 0
    for chunk in cut_source(source, chunk_bytes):
        items, count = read_chunk(chunk, "text")
        assert not count or lines_before(chunk) == lines
        found += [(lines + item.line, item.text) for item in items]
        lines += count
    assert found == [(n, text) for n, text in enumerate(texts, start=1) if text]
    assert lines == len(texts)


def test_standard_library_has_hundreds_of_modules_and_no_tests():
    source = open_source("python-stdlib")
    names = [file.name for file in source.files]
    assert len(names) > 400 and "asyncio/events.py" in names and names == sorted(names)
    assert not [
        name for name in names if not name.endswith(".py") or "site-packages" in name or "/test" in name
    ]
    assert Path(source.files[0].path).is_relative_to(sysconfig.get_paths()["stdlib"])


def test_byte_order_mark_is_not_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "line"}')
    assert [item[2] for item in read_all(tmp_path)] == ["hello", "line"]


def test_unusable_files_and_lines_are_named_with_the_reason(tmp_path):
    write(tmp_path / "1.txt", b"early \0 zero")
    write(tmp_path / "2.txt", b"x" * 10000 + b"\0")
    write(tmp_path / "3.txt", b"latin \xe9")
    (tmp_path / "4.txt").symlink_to(tmp_path / "gone")
    lines = [b'{"text": 3}', b'{"body": "b"}', b"{torn", b'{"text": "\xe9"}', b'{"text": "\\ud800"}', b"[1]"]
    write(tmp_path / "5.jsonl", b"\n".join(lines))
    found = read_all(tmp_path)
    wanted = [
        ("1.txt", 0, "binary"),
        ("2.txt", 0, "binary"),
        ("3.txt", 0, "not UTF-8 (byte 6)"),
        ("4.txt", 0, "cannot be read: No such file"),
        ("5.jsonl", 1, 'no text under "text"'),
        ("5.jsonl", 2, "the line has body"),
        ("5.jsonl", 3, "not JSON"),
        ("5.jsonl", 4, "not UTF-8 (byte 10 of the line)"),
        ("5.jsonl", 5, "surrogate"),
        ("5.jsonl", 6, "the line has list"),
    ]
    assert [item[:2] for item in found] == [item[:2] for item in wanted]
    assert all(reason in item[2] for item, (_, _, reason) in zip(found, wanted, strict=True)), found


def test_truncated_gzip_keeps_its_lines_and_is_named(tmp_path):
    lines = b"".join(json.dumps({"text": os.urandom(200).hex()}).encode() + b"\n" for _ in range(50))
    whole = gzip.compress(lines)
    write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])
    found = read_all(tmp_path)
    assert 5 < len(found) < 50 and "not a whole gzip file" in found[-1][2]


def test_text_key_is_configurable(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert read_all(tmp_path, text_key="body") == [("a.jsonl", 1, "yes")]


def test_unreadable_json_lines_file_is_a_skip(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}')
    chunk = next(cut_source(open_source(str(path)), 100))
    path.unlink()
    assert read_chunk(chunk, "text") == (
        [Skip(file=0, line=0, reason="cannot be read: No such file or directory")],
        0,
    )


def test_missing_path_names_the_choices(tmp_path):
    with pytest.raises(DataError, match=r"data.path=.*nowhere does not exist; set it to a folder of text"):
        open_source(str(tmp_path / "nowhere"))


def test_folder_without_files_is_refused(tmp_path):
    write(tmp_path / ".hidden", "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="holds no file to read"):
        open_source(str(tmp_path))


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "inner" / "a.txt", "x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"inner cannot be read \(Permission denied\)"):
        open_source(str(tmp_path))
