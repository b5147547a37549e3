"""Tokenizers: bytes, files, the end of a document, special tokens in text."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longctx.data.tokenizers import BytesTokenizer, fingerprint, load_tokenizer
from longctx.errors import DataError


def save_tokenizer(folder, *, special=("</s>",), truncate=False):
    """A small byte-level BPE whose file also asks for truncation and padding, as exported ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    if truncate:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=4)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("a\u00fc").tolist() == [97, 0xC3, 0xBC]
    assert tokenizer.decode([97, 0xC3, 0xBC, 256]) == "a\u00fc"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = BytesTokenizer()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_file_round_trip_without_truncation_padding_or_added_tokens(tmp_path):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, truncate=True)))
    text = "the quick brown fox, \u00fcber\n\tthe lazy dog"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and len(ids) > 4 and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.max() < tokenizer.vocab_size


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids.tolist()) == "a</s>b"


def test_folder_names_the_file_in_it(tmp_path):
    save_tokenizer(tmp_path)
    assert (
        load_tokenizer(str(tmp_path)).vocab_size
        == load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size
    )


@pytest.mark.parametrize(
    ("special", "beside", "wanted"),
    [
        (["<|endoftext|>"], None, "<|endoftext|>"),
        (["<|im_end|>", "<|endoftext|>"], None, "<|endoftext|>"),
        (["<|im_end|>", "<|endoftext|>"], {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        (["</s>", "<stop>"], {"eos_token": {"content": "<stop>", "lstrip": False}}, "<stop>"),
        (["</s>"], {"bos_token": "x"}, "</s>"),
    ],
)
def test_end_of_document_is_found(tmp_path, special, beside, wanted):
    path = save_tokenizer(tmp_path, special=special)
    if beside is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    assert load_tokenizer(str(path)).eos_id == Tokenizer.from_file(str(path)).token_to_id(wanted)


@pytest.mark.parametrize(
    ("special", "beside", "message"),
    [
        (["<x>"], None, r"</s> or .* is not in its vocabulary.*tokenizer_config.json"),
        (["</s>"], {"eos_token": "<gone>"}, "<gone> is not in its vocabulary"),
    ],
)
def test_missing_end_of_document_is_an_instruction(tmp_path, special, beside, message):
    path = save_tokenizer(tmp_path, special=special)
    if beside is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


def test_unreadable_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data.tokenizer=.*gone: no such file; set it to `bytes`"):
        load_tokenizer(str(tmp_path / "gone"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read by the tokenizers library"):
        load_tokenizer(str(tmp_path))


def test_damaged_config_beside_is_named(tmp_path):
    path = save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config.json is not a JSON object"):
        load_tokenizer(str(path))


def test_fingerprint_follows_the_file_and_the_config_beside_it(tmp_path):
    path = str(save_tokenizer(tmp_path))
    first = fingerprint(path)
    assert first == load_tokenizer(path).fingerprint and fingerprint("bytes") != first
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    second = fingerprint(path)
    save_tokenizer(tmp_path, special=["</s>", "<more>"])
    assert len({first, second, fingerprint(path)}) == 3
