"""Composition, precedence, sources, and what is said about wrong keys and values."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import schema
from longctx.config.keys import all_keys, value_of
from longctx.config.load import load
from longctx.config.schema import Config
from longctx.config.show import RESOLVED, save, to_yaml
from longctx.errors import ConfigError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder `configs` with two fragments and a recipe, and another working folder."""
    files = {
        "configs/model/small.yaml": "model: {num_layers: 2, hidden_size: 64}\n",
        "configs/model/large.yaml": "compose: [model/small]\nmodel: {num_layers: 8}\n",
        "configs/recipes/base.yaml": (
            "compose: [model/large]\nmodel: {hidden_size: 32}\ntrain: {lr: 1e-4, steps: 7}\n"
        ),
        "mine.yaml": "train:\n  steps: 9\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*overrides, files=("quickstart",)):
    with pytest.raises(ConfigError) as caught:
        load(files, overrides)
    return str(caught.value)


def test_without_files_every_value_is_a_default():
    loaded = load([])
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


def test_default_file_command_line_in_this_order(tree):
    loaded = load(["configs/recipes/base.yaml", "mine.yaml"], ["train.lr=2e-4"])
    assert loaded.config.model.num_layers == 8  # a fragment's own key over the one it composes
    assert loaded.config.model.hidden_size == 32  # a recipe's own key over its fragments
    assert loaded.config.train.steps == 9  # a later file over an earlier one
    assert loaded.config.train.lr == 2e-4  # the command line over all
    assert loaded.sources["model.num_layers"] == "file:configs/model/large.yaml"
    assert loaded.sources["model.hidden_size"] == "file:configs/recipes/base.yaml"
    assert loaded.sources["train.steps"] == "file:mine.yaml"
    assert loaded.sources["train.lr"] == "command line"
    assert loaded.sources["train.eps"] == "default"


def test_the_last_of_two_overrides_wins():
    assert load([], ["train.steps=1", "train.steps=2"]).config.train.steps == 2


def test_tilde_returns_to_the_default(tree):
    loaded = load(["configs/recipes/base.yaml"], ["~train.lr"])
    assert loaded.config.train.lr == Config().train.lr
    assert loaded.sources["train.lr"] == "default"
    assert loaded.config.train.steps == 7


def test_tilde_takes_a_whole_section_back_and_what_follows_counts(tree):
    loaded = load(["configs/recipes/base.yaml"], ["train.steps=3", "~train", "train.lr=1.0"])
    assert loaded.config.train.steps == Config().train.steps
    assert loaded.config.train.lr == 1.0


def test_a_fragment_on_the_command_line_wins_over_the_files():
    loaded = load(["quickstart"], ["compose+=model/llama3-8b"])
    assert loaded.config.model.hidden_size == 4096
    assert loaded.config.train.steps == load(["quickstart"]).config.train.steps


def test_a_file_of_ones_own_finds_the_shipped_fragments(tree):
    (tree / "mine.yaml").write_text("compose: [model/llama3.2-1b]\n")
    assert load(["mine.yaml"]).config.model.num_layers == 16


def test_fragments_beside_the_recipe_come_before_the_shipped_ones(tree):
    (tree / "configs/model/tiny.yaml").write_text("model: {num_layers: 77}\n")
    (tree / "configs/recipes/base.yaml").write_text("compose: [model/tiny]\n")
    assert load(["configs/recipes/base.yaml"]).config.model.num_layers == 77


def test_a_file_that_composes_itself_is_refused(tree):
    (tree / "configs/model/small.yaml").write_text("compose: [model/large]\n")
    assert "composes itself" in refusal(files=["configs/recipes/base.yaml"])


def test_units_and_interpolation():
    config = load(
        [], ["data.seq_len=128k", "run.device_memory=24GiB", "data.cache_dir=${run.dir}/data"]
    ).config
    assert config.data.seq_len == 131072
    assert config.run.device_memory == 24 * 1024**3
    assert config.data.cache_dir == "runs/quickstart/data"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=4", ["train.stepz", "train.steps", "command line"]),
        ("parallel.ulises=2", ["did you mean parallel.ulysses"]),
        ("lr=3", ["did you mean train.lr"]),
        ("model.rope.tetha=3", ["did you mean model.rope.theta"]),
        ("~train.stepz", ["did you mean train.steps"]),
        ("qqqq.zzzz=1", ["the sections are", "parallel"]),
        ("model=llama3-8b", ["is a section", "num_layers"]),
        ("compose+=model/tinyy", ["did you mean model/tiny"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_an_unknown_key_names_the_closest(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ["train.steps='many'", "command line", "an integer"]),
        ("train.steps=1k", ["train.steps", "an integer"]),
        ("train.steps=1.5", ["an integer"]),
        ("train.lr=fast", ["a number"]),
        ("train.lr=null", ["a number"]),
        ("train.steps=[1]", ["an integer"]),
        ("run.resume=perhaps", ["true or false"]),
        ("data.seq_len=8q", ["data.seq_len=8q", "1k = 1024 tokens"]),
        ("data.tail=bite", ["keep or drop"]),
        ("parallel.ulysses=all", ["an integer or auto"]),
        ("train.dtype=float16", ["bfloat16, float32 or float64"]),
        ("data.path=${run.nothing}", ["data.path", "run.nothing"]),
        ("data.path={", ["not valid YAML"]),
    ],
)
def test_a_wrong_value_names_key_value_source_and_type(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1", ["bad.yaml", "not valid YAML", "line 1"]),
        ("- a\n- b\n", ["bad.yaml", "holds a list"]),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", ["bad.yaml", "duplicate"]),
        ("compose: model/tiny\n", ["bad.yaml", "compose", "list"]),
        ("train: {stepz: 1}\n", ["file:bad.yaml", "train.steps"]),
        ("train: {steps: x}\n", ["file:bad.yaml", "an integer"]),
    ],
)
def test_a_bad_file_is_named(tree, text, words):
    Path("bad.yaml").write_text(text)
    message = refusal(files=["bad.yaml"])
    assert all(word in message for word in words), message


def test_a_missing_file_names_the_closest_recipe():
    message = refusal(files=["recipes/quikstart"])
    assert "recipes/quikstart.yaml" in message
    assert "did you mean recipes/quickstart" in message


def test_an_empty_section_sets_nothing(tree):
    Path("mine.yaml").write_text("train:\nmodel: {}\n")
    assert load(["mine.yaml"]).config == Config()


MAPPINGS = {"curriculum.weights", "step_plan.comm_ms_per_token"}


@given(st.sampled_from(sorted(set(all_keys()) - MAPPINGS)), st.data())
def test_no_key_takes_a_mapping(key, data):
    stranger = data.draw(st.sampled_from(["x", "lr", "theta"]))
    assert f"{key}.{stranger}" not in all_keys()
    assert "unknown key" in refusal(f"{key}.{stranger}=1", files=[])


def test_entries_of_a_mapping_are_set_one_by_one_or_whole():
    files = ["quickstart"]
    one = load(files, ["curriculum.weights.256=1", "curriculum.weights.8k=4"])
    assert one.config.curriculum.weights == {"256": 1.0, "8k": 4.0}
    assert one.sources["curriculum.weights"] == "command line"
    whole = load(files, ["curriculum.weights={256: 1, 8k: 4}"])
    assert whole.config == one.config


def test_a_wrong_key_of_a_source_is_named():
    message = refusal("data.sources=[{name: a, pth: b}]")
    assert "data.sources[0]" in message or "pth" in message


def test_saved_yaml_loads_to_the_same_values(tmp_path):
    config = load(["quickstart"], ["model.sliding_window=1k", "train.eps=1e-12", "run.seed=3"]).config
    assert load([str(save(config, tmp_path))]).config == config
    assert yaml.safe_load((tmp_path / RESOLVED).read_text()) == yaml.safe_load(to_yaml(config))
    assert [path.name for path in tmp_path.iterdir()] == [RESOLVED]


def test_every_key_has_a_value_and_every_field_a_description():
    assert all(value_of(Config(), name) == key.default for name, key in all_keys().items())
    tree = ast.parse(Path(schema.__file__).read_text())
    for node in (each for each in tree.body if isinstance(each, ast.ClassDef)):
        described = {
            field.target.id
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        cls = getattr(schema, node.name)
        assert is_dataclass(cls)
        assert described == {field.name for field in fields(cls)}, node.name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rope.none_layers=[a]", ["model.rope.none_layers=['a']", "a list, each an integer"]),
        ("model.rope.short_factor=[1.0, x]", ["model.rope.short_factor", "a list, each a number"]),
        ("data.sources=[{name: a, weight: x}]", ["data.sources=", "weight", "'x'"]),
    ],
)
def test_a_wrong_entry_of_a_list_names_its_key(override, words):
    message = refusal(override)
    assert all(word in message for word in words)
    assert "$VALUE" not in message


def test_yaml_off_is_the_choice_off_or_none(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "metrics: {wandb: off}\ncurriculum: {kind: off}\nrun: {resume: off}\n"
    )
    config = load([str(tmp_path / "mine.yaml")], ["train.recompute=off"]).config
    assert (config.metrics.wandb, config.curriculum.kind, config.train.recompute) == ("off", "none", "none")
    assert config.run.resume is False
    assert "run.device_memory=False" in refusal("run.device_memory=off")


def test_a_missing_file_is_named_as_it_was_written():
    assert "file nope.yaml in" in refusal(files=("nope.yaml",))
    assert "file nope or nope.yaml in" in refusal(files=("nope",))
