"""Resolving `auto` for a world, and the checks across fields."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.check import ONE_RANK_AXES, parallel_config, resolve
from longctx.config.load import load
from longctx.config.memory import estimate, layer_params, total_params
from longctx.config.schema import Config, ModelConfig, Strategy
from longctx.config.show import describe
from longctx.errors import ConfigError

QUICKSTART = load(["quickstart"]).config
LLAMA = load(["quickstart"], ["compose+=model/llama3-8b"]).config


def degrees(config, world, device="cuda", **kwargs):
    found = parallel_config(resolve(config, world, device, **kwargs))
    found.check(world)
    return found.dp_shard, found.ring, found.ulysses


def with_overrides(*overrides):
    return load(["quickstart"], overrides).config


def refusal(*overrides, world=8, device="cuda"):
    with pytest.raises(ConfigError) as caught:
        resolve(with_overrides(*overrides), world, device)
    return str(caught.value)


@pytest.mark.parametrize(
    ("world", "device", "expected"),
    [
        (1, "cpu", (1, 1, 1)),
        (2, "cpu", (1, 1, 2)),  # the sequence is split over both
        (1, "cuda", (1, 1, 1)),
        (8, "cuda", (1, 2, 4)),  # four heads, so ulysses 4 and a ring of 2
    ],
)
def test_the_quickstart_runs_unchanged(world, device, expected):
    assert degrees(QUICKSTART, world, device) == expected


def test_more_microbatches_go_to_data_parallel_groups():
    config = with_overrides("train.global_batch_tokens=64k", "train.microbatch_tokens=8k")
    assert degrees(config, 8) == (8, 1, 1)
    config = with_overrides("train.global_batch_tokens=32k", "train.microbatch_tokens=8k")
    assert degrees(config, 8) == (4, 1, 2)


def test_a_longer_sequence_is_split_further():
    def cp(seq_len, world=64):
        config = load(
            ["quickstart"],
            [
                "compose+=model/llama3-8b",
                f"data.seq_len={seq_len}",
                f"train.microbatch_tokens={seq_len}",
                "train.global_batch_tokens=64M",
            ],
        ).config
        dp_shard, ring, ulysses = degrees(config, world)
        assert dp_shard * ring * ulysses == world
        return ring, ulysses

    assert cp("8k") == (1, 1)
    assert cp("32k") == (1, 4)
    assert cp("128k") == (2, 8)  # heads are exchanged inside the node of 8, the ring crosses nodes


def test_a_smaller_node_moves_degrees_to_the_ring():
    config = with_overrides("compose+=model/llama3-8b", "parallel.dp_shard=1", "data.seq_len=8k")
    assert degrees(config, 16, node_ranks=8) == (1, 2, 8)
    assert degrees(config, 16, node_ranks=4) == (1, 4, 4)


def test_fixed_degrees_stay_and_auto_fills_the_rest():
    assert degrees(with_overrides("parallel.ring=2"), 8) == (1, 2, 4)
    assert degrees(with_overrides("parallel.ulysses=2"), 8) == (1, 4, 2)
    assert degrees(with_overrides("parallel.dp_shard=2"), 8) == (2, 1, 4)
    assert degrees(with_overrides("parallel.dp_replicate=2"), 4) == (1, 1, 2)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("local", (2, 1, 1)),
        ("ulysses", (1, 1, 2)),
        ("ring", (1, 2, 1)),
        ("usp", (1, 1, 2)),
        ("allgather", (1, 1, 2)),
    ],
)
def test_auto_follows_the_strategy(strategy, expected):
    assert degrees(with_overrides(f"attention.strategy={strategy}"), 2, "cpu") == expected


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2), (4, 1, 1), (1, 1, 4), (2, 1, 2)])
def test_every_layout_of_small_worlds_is_accepted(layout):
    names = ("dp_shard", "ring", "ulysses")
    overrides = [f"parallel.{name}={degree}" for name, degree in zip(names, layout, strict=True)]
    assert degrees(with_overrides(*overrides), 4, "cpu") == layout


@settings(deadline=None)
@given(st.integers(1, 96), st.sampled_from([1, 2, 4, 8]), st.integers(0, 6))
def test_auto_always_multiplies_to_the_world(world, node_ranks, doublings):
    train = replace(QUICKSTART.train, global_batch_tokens=8192 << doublings, microbatch_tokens=8192)
    config = replace(QUICKSTART, train=train)
    dp_shard, ring, ulysses = degrees(config, world, "cpu", node_ranks=node_ranks)
    assert dp_shard * ring * ulysses == world
    assert ulysses <= config.model.num_heads and node_ranks % ulysses == 0
    # nobody idles: a divisor of the world always keeps all busy, at the latest the world itself
    assert dp_shard <= 1 << doublings


def test_the_rest_of_auto_is_resolved():
    config = resolve(QUICKSTART, 1, "cuda")
    assert config.train.dtype == "bfloat16"
    assert config.train.microbatch_tokens == 8192
    assert config.model.rope.head_dim == config.model.head_dim
    assert config.run.device == "cuda"
    assert config.model.vocab_size == "auto"  # the tokenizer decides
    assert resolve(QUICKSTART, 1, "cpu").train.dtype == "float32"
    assert resolve(with_overrides("train.dtype=float64"), 1, "cpu").train.dtype == "float64"


def test_resolving_twice_changes_nothing():
    once = resolve(QUICKSTART, 8, "cuda")
    assert resolve(once, 8, "cuda") == once


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.dp_shard=3", "parallel.ring=1", "parallel.ulysses=1"],
            ["dp_shard=3", "need 3 processes, not 8"],
        ),
        (["parallel.ring=3"], ["parallel.ring=3", "8 processes", "parallel.dp_shard=auto"]),
        (
            ["parallel.ulysses=8", "parallel.ring=1"],
            ["parallel.ulysses=8 exceeds model.num_heads=4", "parallel.ring"],
        ),
        (["parallel.ulysses=0"], ["parallel.ulysses=0", "at least 1"]),
        (["parallel.tp=3", "parallel.dp_shard=auto"], ["parallel.tp=3"]),
        (["parallel.tp=8"], ["parallel.tp=8 does not divide model.num_heads=4; choose one of 1, 2, 4"]),
        (
            ["parallel.tp=2", "model.ffn_size=131"],
            ["parallel.tp=2 does not divide model.ffn_size=131; choose one of 1"],
        ),
        (
            ["parallel.tp=2", "parallel.ulysses=4", "parallel.ring=1"],
            ["parallel.tp=2 leaves 2 of model.num_heads=4", "parallel.ulysses=4"],
        ),
        (
            ["parallel.tp=4", "model.num_heads=12", "model.num_kv_heads=6"],
            ["parallel.tp=4 neither divides model.num_kv_heads=6", "choose one of 1, 2, 3, 6, 12"],
        ),
        (["parallel.pp=8"], ["parallel.pp=8", "set parallel.pp=4"]),
        (["parallel.ep=2"], ["parallel.ep=2", "expert"]),
        (["parallel.tp=3"], ["cannot multiply to 8 processes", "start a multiple of 3 processes"]),
        (["step_plan.effort=nan"], ["step_plan.effort=nan; choose more than 0"]),
        (["step_plan.alpha1_ms=-1"], ["step_plan.alpha1_ms=-1"]),
        (["step_plan.capacity_tokens=0"], ["step_plan.capacity_tokens=0; choose auto"]),
        (["step_plan.comm_ms_per_token={3: 0.1}"], ["degree 3", "powers of two"]),
        (["step_plan.comm_ms_per_token={x: 0.1}"], ["degree x", "powers of two"]),
        (["step_plan.comm_ms_per_token={2: -1}"], ["-1.0 ms for degree 2"]),
        (["data.seq_len=16k"], ["data.seq_len=16k exceeds train.microbatch_tokens=8k"]),
        (
            ["train.microbatch_tokens=16k"],
            ["train.global_batch_tokens=8k is below train.microbatch_tokens=16k"],
        ),
        (["model.num_kv_heads=3"], ["model.num_kv_heads=3 does not divide model.num_heads=4", "1, 2, 4"]),
        (["model.head_dim=33"], ["model.head_dim=33 is odd"]),
        (["model.vocab_size=0"], ["model.vocab_size=0"]),
        (["train.steps=0"], ["train.steps=0; choose at least 1"]),
        (["train.lr=nan"], ["train.lr=nan"]),
        (["train.beta2=1.0"], ["train.beta2=1.0"]),
        (["data.held_out=1.5"], ["data.held_out=1.5"]),
        (["data.min_len=9k"], ["data.min_len=9216 exceeds data.seq_len=8192"]),
        (["run.port=70000"], ["run.port=70000"]),
        (
            ["attention.strategy=local", "parallel.ring=2", "parallel.ulysses=1"],
            ["strategy=local needs parallel.ring=1"],
        ),
        (["attention.strategy=ulysses", "parallel.ring=2"], ["strategy=ulysses needs parallel.ring=1"]),
        (["attention.strategy=ring", "parallel.ulysses=2"], ["strategy=ring needs parallel.ulysses=1"]),
    ],
)
def test_what_cannot_run_is_refused_with_the_key_to_change(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_auto_leaves_heads_to_tensor_parallel_ranks():
    assert degrees(with_overrides("parallel.tp=4"), 8, "cpu") == (1, 2, 1)
    assert degrees(with_overrides("parallel.tp=2"), 8, "cpu") == (1, 2, 2)


LONG = ("compose+=model/llama3-8b", "data.seq_len=1M", "train.global_batch_tokens=1M")


def test_a_sequence_longer_than_the_layout_holds_is_refused():
    message = refusal(*LONG, "parallel.dp_shard=1", "parallel.ring=1", "parallel.ulysses=8")
    assert "data.seq_len=1M" in message and "parallel.ulysses=8" in message and "of 80.0 GiB" in message
    message = refusal(*LONG)
    assert "even with the sequence split over 8" in message and "run.device_memory" in message


def test_the_memory_limit_can_be_raised_or_lifted():
    assert degrees(with_overrides(*LONG, "run.device_memory=0"), 8) == (1, 1, 8)
    assert degrees(with_overrides(*LONG, "run.device_memory=100TB"), 8) == (1, 1, 8)
    assert degrees(with_overrides(*LONG), 8, "cpu") == (1, 1, 8)  # one machine's memory, however split


def test_worlds_and_devices_that_do_not_exist():
    with pytest.raises(ConfigError, match="a world of 0 processes"):
        resolve(Config(), 0, "cpu")
    with pytest.raises(ConfigError, match="tpu"):
        resolve(Config(), 1, "tpu")


def test_a_layout_in_words():
    text = describe(resolve(QUICKSTART, 2, "cpu"))
    assert "ulysses 2 on 2 cpu processes" in text
    assert "4k on each process" in text
    assert "have no microbatch" in describe(resolve(with_overrides("parallel.dp_shard=2"), 2, "cpu"))


def test_parameters_counted_by_hand():
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_size=16, num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True,
        attention_bias=True, tied_embeddings=False,
    )  # fmt: skip
    matrices = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16
    assert layer_params(model) == matrices + (16 + 8 + 8) + 2 * 8 + 2 * 4
    assert total_params(model, 10) == 2 * layer_params(model) + 2 * 10 * 8 + 8


def test_memory_terms_shrink_with_their_degree():
    def need(tokens, shards):
        return estimate(LLAMA.model, vocab_size=128256, rank_tokens=tokens, shards=shards, dtype="bfloat16")

    whole, half = need(8192, 1), need(4096, 2)
    assert half.state == whole.state / 2
    assert half.activations == whole.activations / 2
    assert half.logits == whole.logits / 2
    assert half.gathered == whole.gathered
    assert whole.state == pytest.approx(16 * 8.03e9, rel=1e-3)
    assert whole.total == whole.state + whole.gathered + whole.activations + whole.logits


def test_the_schema_and_the_attention_registry_know_the_same_strategies():
    from parallel.attention.registry import STRATEGIES

    assert set(get_args(Strategy)) == set(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        served = {axis for axis in ("ring", "ulysses") if getattr(strategy, axis)}
        assert served == {"ring", "ulysses"} - set(ONE_RANK_AXES.get(name, ()))


def test_tensor_parallelism_across_nodes_is_refused_with_its_cost():
    config = with_overrides("parallel.tp=8", "model.num_heads=8")
    with pytest.raises(ConfigError) as caught:
        resolve(config, 8, "cpu", node_ranks=4)
    assert "does not divide the 4 ranks of a node" in str(caught.value)
    assert "MiB a rank and microbatch" in str(caught.value)
    assert "choose one of 1, 2, 4" in str(caught.value)


def test_mixed_windows_train():
    extended = ["model.rope.type=linear", "model.rope.factor=2", "model.rope.original_len=4096"]
    found = resolve(load(["quickstart"], [*extended, "model.rope.mixed_window=true"]).config, 1, "cpu")
    assert found.model.rope.mixed_window


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("eval.tasks=[niah_singel]", "did you mean 'niah_single'"),
        ("eval.lengths=[1]", "at least 2 tokens"),
        ("eval.depths=0", "at least 1"),
        ("eval.remap.type=dpe", "longctx.rope.remap.search_scales"),
        ("eval.remap.type=string eval.remap.window=100k", "beyond the training length"),
        ("eval.remap.type=string eval.remap.local=5k", "below eval.remap.window=4096"),
    ],
)
def test_evaluation_keys_are_checked(keys, words):
    with pytest.raises(ConfigError, match=words):
        resolve(load(["quickstart"], keys.split(" ")).config, 1, "cpu")


def test_tensor_parallel_ranks_hold_their_share_of_every_term():
    def need(tp, tokens=131072):
        return estimate(LLAMA.model, vocab_size=128256, rank_tokens=tokens, shards=8, dtype="bfloat16", tp=tp)

    one, two = need(1), need(2)
    for term in ("state", "gathered", "logits"):
        assert getattr(two, term) == getattr(one, term) / 2
    # Of each token's elements only the two gathered inputs of E channels stay whole.
    model = LLAMA.model
    whole = 131072 * model.num_layers * 2 * model.hidden_size * 2
    assert two.activations - whole == (one.activations - whole) / 2
    # 16 ranks and 8 key heads: each rank still computes one.
    assert need(16).activations > one.activations / 16 + whole * 15 / 16


def test_tensor_parallel_degrees_count_when_auto_degrees_must_fit():
    overrides = ("data.seq_len=32k", "train.global_batch_tokens=32k", "run.device_memory=64GiB")
    config = load(["quickstart"], ["compose+=model/llama3-8b", *overrides, "parallel.tp=8"]).config
    assert degrees(config, 8) == (1, 1, 1)
    with pytest.raises(ConfigError, match="needs about"):
        resolve(
            replace(config, parallel=replace(config.parallel, tp=1, dp_shard=8, ring=1, ulysses=1)), 8, "cuda"
        )
