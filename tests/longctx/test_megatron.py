"""Megatron-core's distributed checkpoints: its own GPT's logits, and metadata that could run code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from longctx.cli.main import main
from longctx.hf.source import open_source
from longctx.infer.loaded import alone, load_model
from longctx.megatron.reader import MegatronReader
from parallel.layout import SequenceLayout

FIXTURE = Path(__file__).parents[1] / "fixtures" / "megatron-gpt"


@pytest.fixture
def theirs(tmp_path):
    return shutil.copytree(FIXTURE, tmp_path / "theirs")


def run(theirs, tmp_path, *, model: str | None = None) -> int:
    return main(
        ["import", str(theirs), str(tmp_path / "ours"), "--model", model or str(theirs / "model.yaml")]
    )


def test_logits_equal_megatrons_own(theirs, tmp_path):
    assert run(theirs, tmp_path) == 0
    expected = json.loads((FIXTURE / "logits.json").read_text())
    ids = torch.tensor(expected["ids"])
    loaded = load_model(open_source(str(tmp_path / "ours")), alone(torch.device("cpu")), torch.float32)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    layout = SequenceLayout.build(cu_seqlens, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    with torch.no_grad():
        logits = loaded.model(ids, torch.arange(len(ids)), layout=layout)
    loaded.close()
    wanted = torch.tensor(expected["logits"])[:, :64]  # rows that pad the vocabulary are left out
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert main(["ckpt", "verify", str(tmp_path / "ours")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("attention_bias: true", "attention_bias: false"), ["linear_qkv.bias", "attention_bias"]),
        (("tied_embeddings: false", "tied_embeddings: true"), ["output_layer.weight", "tied_embeddings"]),
        (("num_layers: 2", "num_layers: 3"), ["2 layers", "num_layers=3"]),
        (("ffn_size: 24", "ffn_size: 32"), ["linear_fc1", "48", "64"]),
        (("attention_bias: true", "attention_bias: true\n  qk_norm: true"), ["q_layernorm", "qk_norm"]),
    ],
)
def test_another_model_is_refused_by_tensor(theirs, tmp_path, capsys, change, words):
    text = (theirs / "model.yaml").read_text()
    assert change[0] in text
    (theirs / "model.yaml").write_text(text.replace(*change))
    assert run(theirs, tmp_path) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "ours").exists()


class Attack:
    def __reduce__(self):
        return eval, ("open('attacked', 'w')",)


def test_metadata_that_would_run_code_is_refused(theirs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (theirs / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(Attack()))
    assert run(theirs, tmp_path) == 2
    assert "eval has no place" in capsys.readouterr().err
    assert not (tmp_path / "attacked").exists()


def test_damage_and_wrong_commands(theirs, tmp_path, capsys):
    for options in ([], ["--verify", "--model", "x"]):
        assert main(["import", str(theirs), str(tmp_path / "ours"), *options]) == 2
        assert "--model" in capsys.readouterr().err
    file = next((theirs / "iter_0000007").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run(theirs, tmp_path) == 2
    assert file.name in capsys.readouterr().err
    file.unlink()
    assert run(theirs, tmp_path) == 2
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_layers_are_read_from_the_stack(theirs):
    reader = MegatronReader(theirs / "iter_0000007")
    name = "decoder.layers.mlp.linear_fc1.weight"
    whole = reader.read(name)
    assert whole.shape == (2, 48, 16)
    assert torch.equal(reader.read(name, 1), whole[1])
