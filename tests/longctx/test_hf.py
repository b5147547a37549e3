"""Import and export: byte-equal weights, logits of transformers, everything else carried along."""

import json

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCAB, edit_config, save_model, tensors_of

from longctx.cli.main import main
from longctx.hf.architectures import CLASSES, model_config
from longctx.hf.source import open_source
from longctx.infer.compare import compare
from longctx.tensors.fill import read_tensor


def logits_of(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_every_byte_and_computes_the_same(family, tmp_path, capsys):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_model(family, theirs, shard="40KB")
    assert main(["import", str(theirs), str(ours)]) == 0
    found = compare(open_source(str(ours)), theirs)
    assert found.equal and found.logits_error <= 1e-5
    assert main(["export", str(ours), str(back), "--max-shard", "30KB", "--verify"]) == 0, capsys.readouterr()
    before, after = tensors_of(theirs), tensors_of(back)
    if theirs_tied := "lm_head.weight" not in after:
        before.pop("lm_head.weight", None)
    assert theirs_tied == (family in ("llama3.2", "qwen2.5"))
    assert before.keys() == after.keys() and len(list(back.glob("*.safetensors"))) > 1
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(40) * 7 % VOCAB
    assert torch.equal(logits_of(theirs, ids), logits_of(back, ids))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (theirs / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_kept_or_cast_on_request(dtype, tmp_path):
    save_model("qwen3", tmp_path / "theirs", dtype=dtype)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    for name, wanted, expected in (("same", "auto", dtype), ("cast", "float32", torch.float32)):
        target = tmp_path / name
        assert main(["export", str(tmp_path / "ours"), str(target), "--dtype", wanted]) == 0
        before, after = tensors_of(tmp_path / "theirs"), tensors_of(target)
        assert all(torch.equal(after[key], before[key].to(expected)) for key in before)
        assert json.loads((target / "config.json").read_text())["dtype"] == str(expected).split(".")[1]


def test_settings_of_transformers_4_are_read(tmp_path):
    save_model("llama3.2", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    edit_config(tmp_path / "theirs", rope_parameters=None, rope_scaling=rope, rope_theta=theta)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--verify"]) == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_keys_that_a_config_lacks_are_those_of_transformers(kind):
    """As in Meta's own Llama 2, which names no rotary base."""
    config = transformers.AutoConfig.for_model(kind)
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    found = {key: getattr(config, key) for key in needed}
    model = model_config({"model_type": kind, "architectures": [CLASSES[kind]], **found}, "config.json")
    assert model.rope.theta == config.rope_parameters["rope_theta"] and model.norm_eps == config.rms_norm_eps
    assert model.num_kv_heads == config.num_key_value_heads
    assert model.head_dim == getattr(config, "head_dim", None) or 4096 // config.num_attention_heads
    assert model.sliding_window == getattr(config, "sliding_window", None)
    assert model.tied_embeddings == config.tie_word_embeddings


def test_verify_names_the_first_layer_that_differs(tmp_path, capsys):
    model = save_model("qwen2", tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] += 0.5
    model.save_pretrained(tmp_path / "other")
    found = compare(open_source(str(tmp_path / "ours")), tmp_path / "other")
    assert not found.equal and found.first_layer == "layer 1"


def test_added_tokens_get_the_mean_row_and_an_id(tmp_path):
    save_model("qwen3", tmp_path / "theirs")
    names = [f"<|tool_{n}|>" for n in range(50)]
    (tmp_path / "tokens.txt").write_text("\n".join(names) + "\n")
    command = ["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    assert main([*command, "--add-tokens", str(tmp_path / "tokens.txt"), "--verify"]) == 0
    source = open_source(str(tmp_path / "ours"))
    old = tensors_of(tmp_path / "theirs")
    assert source.model.vocab_size == 257 + 50
    matrices = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    for ours, theirs in matrices.items():
        rows = read_tensor(source.index, ours)
        assert rows.shape == (307, 32)
        assert torch.equal(rows[:257], old[theirs][:257])
        torch.testing.assert_close(rows[257:], old[theirs][:257].mean(0).expand(50, -1))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("a<|tool_49|>b")["input_ids"] == [97, 306, 98]
    assert logits_of(tmp_path / "back", torch.tensor([97, 306, 98])).shape == (3, 307)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_model("llama3.2", folder / "model", shard="40KB")
    return folder / "model"


def copy(saved, tmp_path):
    import shutil

    return shutil.copytree(saved, tmp_path / "theirs")


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])


def change_tensor(folder, change):
    from safetensors.torch import load_file, save_file

    file = next(f for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def grow_tokenizer(folder):
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.add_tokens([f"t{n}" for n in range(100)])
    found.save(str(folder / "tokenizer.json"))


def lie_in_header(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b'"shape":[32]', b'"shape":[23]'))


def pickled(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


LLAMA3_WITHOUT_ORIGINAL = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0
}  # fmt: skip
BAD = {
    "missing shard": (drop_shard, ["00002-of-", "missing", "download"]),
    "truncated shard": (cut_shard, ["00002-of-", "bytes"]),
    "wrong shape": (
        lambda f: change_tensor(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.norm.weight", "(31,)", "(32,)"],
    ),
    "shape without its bytes": (lie_in_header, [".safetensors", "broken header", "128 bytes", "(23,)"]),
    "missing tensor": (
        lambda f: change_tensor(f, lambda t: t.pop("model.norm.weight")),
        ["model.norm.weight is missing"],
    ),
    "integer weights": (
        lambda f: change_tensor(f, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.int8)})),
        ["model.norm.weight", "I8", "BF16"],
    ),
    "tokenizer": (grow_tokenizer, ["tokenizer.json", "356", "vocab_size=300"]),
    "pickle": (pickled, ["pytorch_model.bin", "safe_serialization"]),
    "architecture": (
        lambda f: edit_config(f, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe"),
        ["Qwen3MoeForCausalLM", "nearest", "Qwen3ForCausalLM"],
    ),
    "no original length": (
        lambda f: edit_config(f, rope_parameters=LLAMA3_WITHOUT_ORIGINAL),
        ["config.json", "original_max_position_embeddings", "llama3"],
    ),
    "partial rotary": (
        lambda f: edit_config(f, partial_rotary_factor=0.5),
        ["config.json", "partial_rotary_factor", "LlamaForCausalLM"],
    ),
    "type": (lambda f: edit_config(f, rms_norm_eps="1e-5"), ["config.json", "rms_norm_eps='1e-5'"]),
    "base": (lambda f: edit_config(f, rope_parameters={"rope_theta": "big"}), ["config.json", "big"]),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    "list as index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        ["index.json", "broken"],
    ),
    "index that leads away": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        ["index.json", "../x is no file name"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_refused_by_name_and_nothing_is_written(case, saved, tmp_path, capsys):
    folder = copy(saved, tmp_path)
    damage, words = BAD[case]
    damage(folder)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_names_that_lead_nowhere(saved, tmp_path, capsys, monkeypatch):
    assert main(["import", "some-lab/some-model", str(tmp_path / "ours")]) == 2
    assert "hf download some-lab/some-model" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing"), str(tmp_path / "ours")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["import", str(saved), str(tmp_path / "file" / "ours")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    assert main(["import", str(saved), str(tmp_path / "ours")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "ours" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("target", [".", "new/.."])
def test_what_lies_beside_a_target_without_a_name_stays(target, saved, tmp_path, monkeypatch):
    (tmp_path / "beside.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["import", str(saved), target]) == 0
    assert (tmp_path / "beside.txt").read_text() == "mine"
    assert (tmp_path / "empty" / "manifest.json").is_file()


def test_a_url_is_no_target(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for verb in ("import", "export"):
        with pytest.raises(SystemExit, match="2"):
            main([verb, str(saved), "memory://bucket/model"])
        assert "memory://bucket/model is a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_files_beside_the_weights_are_left_alone(tmp_path):
    from safetensors.torch import save_file

    save_model("qwen3", tmp_path / "theirs")
    save_file({"adapter": torch.ones(3)}, tmp_path / "theirs" / "adapter.safetensors")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0


def test_a_carried_file_that_was_altered_is_named(saved, tmp_path, capsys):
    assert main(["import", str(saved), str(tmp_path / "ours")]) == 0
    file = tmp_path / "ours" / "hf" / "config.json"
    file.write_text(file.read_text().replace("256", "255", 1))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 1
    assert "hf/config.json is altered" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_hub_cache_entry_is_found(saved, tmp_path):
    import shutil

    entry = tmp_path / "models--lab--name"
    shutil.copytree(saved, entry / "snapshots" / "abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    assert main(["import", str(entry), str(tmp_path / "ours")]) == 0


def test_a_full_disk_is_refused_before_anything_is_written(saved, tmp_path, capsys, monkeypatch):
    from longctx.tensors.folder import LocalFolder

    monkeypatch.setattr(LocalFolder, "free_bytes", lambda self: 1000)
    assert main(["import", str(saved), str(tmp_path / "ours")]) == 2
    assert "free" in capsys.readouterr().err
    assert main(["export", str(saved), str(tmp_path / "back")]) == 2
    assert not list(tmp_path.iterdir())
