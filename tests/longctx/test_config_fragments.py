"""Every shipped file loads, and every model fragment replaces any other whole."""

from pathlib import Path

import pytest

from longctx.config.check import check_model, resolve
from longctx.config.compose import CLONE_CONFIGS, flatten, read_mapping
from longctx.config.load import load
from longctx.config.memory import total_params

MODELS = sorted((CLONE_CONFIGS / "model").glob("*.yaml"))
FILES = sorted(
    path for path in CLONE_CONFIGS.rglob("*.yaml") if path.parent.name != "cluster"
)  # sites: launch
# Published sizes in units of 1e9 parameters, embeddings included.
PUBLISHED = {
    "llama2-7b": 6.74, "llama2-13b": 13.02, "llama2-70b": 68.98,
    "llama3-8b": 8.03, "llama3-70b": 70.55, "llama3-405b": 405.85, "llama3.1-8b": 8.03, "llama3.1-70b": 70.55,
    "llama3.2-1b": 1.24, "llama3.2-3b": 3.21, "mistral-7b": 7.25,
    "qwen2-0.5b": 0.494, "qwen2-1.5b": 1.54, "qwen2-7b": 7.62, "qwen2-72b": 72.71,
    "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71,
    "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLONE_CONFIGS)))
def test_every_file_loads_alone(path: Path):
    load([str(path)])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_fragment_states_every_architecture_key(path: Path):
    stated = {key for key, _ in flatten(read_mapping(path))}
    assert stated == {key for key, _ in flatten(read_mapping(CLONE_CONFIGS / "model/tiny.yaml"))}
    check_model(load([str(path)]).config.model)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_model_has_its_published_number_of_parameters(name):
    model = load([f"model/{name}"]).config.model
    assert isinstance(model.vocab_size, int)
    assert total_params(model, model.vocab_size) / 1e9 == pytest.approx(PUBLISHED[name], rel=4e-3)


def test_every_model_but_tiny_is_checked_against_its_published_size():
    assert {path.stem for path in MODELS} - {"tiny"} == set(PUBLISHED)


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-0.6b", "llama3.2-1b"])
def test_recipes_resolve_with_another_model(name):
    config = load(["quickstart"], [f"compose+=model/{name}"]).config
    resolve(config, 8, "cuda")
