"""The presets have the public models' exact parameter counts and rope that exists."""

from pathlib import Path

import pytest

from longctx.config.load import load
from longctx.model.params import num_parameters, vocab_rows
from longctx.rope import check_rope
from longctx.rope.spec import with_head_dim

FOLDER = Path(__file__).parents[2] / "configs" / "model"
PUBLIC = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def preset(name):
    return load([str(FOLDER / f"{name}.yaml")]).config.model


def test_every_preset_is_checked_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {"tiny"} == PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_parameter_count_is_the_public_one(name):
    config = preset(name)
    count = num_parameters(config)
    assert count.total == PUBLIC[name]
    assert count.total - count.non_embedding == vocab_rows(config) * config.hidden_size


@pytest.mark.parametrize("name", [*PUBLIC, "tiny"])
def test_rope_is_accepted(name):
    config = preset(name)
    check_rope(with_head_dim(config.rope, config.head_dim))
