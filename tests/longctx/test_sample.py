"""Sampling equals transformers' generate, from a Hugging Face folder, an import and a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import edit_config, save_model, tensors_of
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx.build import World
from longctx.cli.main import main
from longctx.errors import ConfigError
from longctx.hf.source import open_source
from longctx.infer.generate import generate
from longctx.infer.loaded import alone, load_model
from longctx.recovery.members import Fixed
from longctx.train.loop import train

ROOT = Path(__file__).parents[2]
PROMPT = "long context"


def expected_tokens(model, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


def ours(folder, ids: list[int], count: int, **options) -> list[int]:
    loaded = load_model(open_source(str(folder)), alone(torch.device("cpu")), torch.float32)
    try:
        return list(generate(loaded, ids, max_new=count, **options))
    finally:
        loaded.close()


@pytest.mark.parametrize("family", ["llama3.2", "mistral", "qwen2.5", "qwen3"])
def test_greedy_tokens_equal_transformers(family, tmp_path):
    model = save_model(family, tmp_path / "model")
    ids = list(PROMPT.encode())
    expected = expected_tokens(model, ids, 40)
    assert ours(tmp_path / "model", ids, 40) == expected
    assert len(set(expected)) > 3


def test_a_seed_decides_the_draws(tmp_path):
    save_model("qwen2", tmp_path / "model")
    draws = [ours(tmp_path / "model", [1, 2], 12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def split_rank(rank: int, size: int, base) -> list[int]:
    world = make_world(base, rank, size)
    loaded = load_model(open_source(str(base / "model")), world, torch.float32)
    tokens = list(generate(loaded, list(PROMPT.encode()), max_new=10))
    loaded.close()
    return tokens


def test_ranks_that_share_the_parameters_say_the_same(tmp_path):
    model = save_model("llama3.2", tmp_path / "model")
    expected = expected_tokens(model, list(PROMPT.encode()), 10)
    assert run_ranks(split_rank, 2, tmp_path, init=False) == [expected] * 2


def sample(*arguments: str, capsys) -> dict:
    assert main(["sample", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_line_ends_at_the_end_token(tmp_path, capsys):
    model = save_model("qwen2", tmp_path / "model")
    tokens = expected_tokens(model, list(PROMPT.encode()), 30)
    end = tokens[20]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps(generation | {"eos_token_id": [999, end]})
    )
    found = sample(str(tmp_path / "model"), "--prompt", PROMPT, "--max-new", "30", capsys=capsys)
    assert found["tokens"] == tokens[: tokens.index(end)] and found["stop"] == "end"
    (tmp_path / "doc.txt").write_text(PROMPT)
    other = sample(
        str(tmp_path / "model"), "--file", str(tmp_path / "doc.txt"), "--max-new", "2", capsys=capsys
    )
    assert other["tokens"] == tokens[:2] and other["stop"] == "length"


def test_a_document_is_not_cut_where_the_tokenizers_file_says(tmp_path, capsys):
    import tokenizers

    save_model("qwen2", tmp_path / "model")
    file = str(tmp_path / "model" / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.enable_truncation(4)
    tokenizer.save(file)
    found = sample(str(tmp_path / "model"), "--prompt", PROMPT, "--max-new", "1", capsys=capsys)
    assert found["prompt_tokens"] == len(PROMPT)


def test_the_chat_template_of_a_model_is_used(tmp_path, capsys):
    import transformers

    save_model("qwen3", tmp_path / "model")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}[assistant]"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    model = str(tmp_path / "model")
    assert sample(model, "--prompt", "hi", "--max-new", "1", capsys=capsys)["prompt_tokens"] == len(expected)
    assert sample(model, "--prompt", "hi", "--max-new", "1", "--raw", capsys=capsys)["prompt_tokens"] == 2
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise }}{% for %}")
    assert main(["sample", model, "--prompt", "hi"]) == 2
    assert "--raw" in capsys.readouterr().err


def train_rank(rank: int, size: int, base, extra) -> int:
    return train(
        make_config(base, "run", size=size, extra=extra), Fixed(make_world(base / "run", rank, size))
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that began from an imported model."""
    base = tmp_path_factory.mktemp("trained")
    save_model("qwen3", base / "model")
    write_corpus(base / "docs")
    assert main(["import", str(base / "model"), str(base / "import")]) == 0
    from longctx.config.load import load

    found = load([str(base / "import" / "model.yaml")]).config
    extra = tuple(
        f"model.{key}={getattr(found.model, key)}"
        for key in ("num_layers", "head_dim", "vocab_size", "qk_norm", "norm_eps")
    )
    extra += (f"model.rope.theta={found.model.rope.theta}", f"checkpoint.init_from={base / 'import'}")
    extra += ("train.steps=2", "train.lr=1e-12", "model.tied_embeddings=false")
    (base / "run").mkdir()
    assert run_ranks(train_rank, 1, base, extra, init=False) == [0]
    return base


def test_a_run_begins_from_an_import_and_exports_again(trained, tmp_path, capsys):
    assert main(["export", str(trained / "run"), str(tmp_path / "out"), "--verify"]) == 0
    before, after = tensors_of(trained / "model"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        trained / "model" / "tokenizer.json"
    ).read_bytes()
    capsys.readouterr()
    found = sample(str(trained / "run"), "--prompt", PROMPT, "--max-new", "8", capsys=capsys)
    again = sample(str(tmp_path / "out"), "--prompt", PROMPT, "--max-new", "8", capsys=capsys)
    assert found["tokens"] == again["tokens"] and "step-00000002" in found["source"]


def test_a_model_section_of_other_weights_is_refused(trained):
    extra = (f"checkpoint.init_from={trained / 'import'}", "model.norm_eps=0.5", "run.resume=false")
    config = make_config(trained, "other", extra=extra)
    (trained / "other").mkdir()
    world = make_world(trained / "other", 0, 1)
    assert isinstance(world, World)
    codes = run_ranks(refused_rank, 1, trained, config, init=False)
    assert codes == [2]
    error = json.loads((trained / "other" / "summary.json").read_text())["error"]
    assert "model.num_layers=2, but the weights in" in error and "have 3" in error and "model.yaml" in error


def refused_rank(rank: int, size: int, base, config) -> int:
    return train(config, Fixed(make_world(base / "other", rank, size)))


def test_merging_a_checkpoint_with_itself_and_with_another(trained, tmp_path, capsys):
    from longctx.tensors.fill import read_tensor

    steps = [str(trained / "import"), str(trained / "run" / "ckpt" / "step-00000002")]
    assert main(["ckpt", "merge", *steps, "--out", str(tmp_path / "mean")]) == 0
    a, b, mean = (open_source(each).index for each in (*steps, str(tmp_path / "mean")))
    for name in a.tensors:
        expected = (read_tensor(a, name).double() + read_tensor(b, name)) / 2
        assert torch.equal(read_tensor(mean, name), expected.float())
    assert main(["ckpt", "verify", str(tmp_path / "mean")]) == 0
    assert main(["ckpt", "merge", steps[0], "--out", str(tmp_path / "no")]) == 2


def test_prompts_that_cannot_be_said(tmp_path, capsys):
    save_model("qwen2", tmp_path / "model")
    with pytest.raises(ConfigError, match="300"):
        ours(tmp_path / "model", [300], 1)
    assert main(["sample", str(tmp_path / "model"), "--prompt", ""]) == 2
    assert "no tokens" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "model"), "--prompt", "\udcff"]) == 2
    assert "UTF-8" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "model"), "--file", str(tmp_path / "absent")]) == 2
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert main(["sample", str(tmp_path / "model"), "--prompt", "x"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    edit_config(tmp_path / "model", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert main(["sample", str(tmp_path / "model"), "--prompt", "x"]) == 2


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    model = save_model("llama3.2", tmp_path / "model")
    expected = expected_tokens(model, list(PROMPT.encode()), 5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "longctx", "sample", str(tmp_path / "model"), "--prompt", PROMPT]
    done = subprocess.run(
        [*command, "--max-new", "5", "--json", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == expected
