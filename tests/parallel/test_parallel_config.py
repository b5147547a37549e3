"""Degrees of parallelism: products, and errors that say what to change."""

import pytest

from parallel.config import ParallelConfig
from parallel.errors import ConfigError


def test_products():
    config = ParallelConfig(pp=2, dp_replicate=3, dp_shard=5, ring=2, ulysses=4, tp=2)
    assert (config.cp, config.fsdp, config.data_ranks, config.world_size) == (8, 40, 120, 480)
    config.check(480)


@pytest.mark.parametrize("axis", ["pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp", "ep"])
@pytest.mark.parametrize("value", [0, -2, 1.5, True])
def test_degrees_are_positive_whole_numbers(axis, value):
    with pytest.raises(ConfigError, match=f"parallel.{axis}="):
        ParallelConfig(**{axis: value})


def test_a_world_of_another_size_names_the_key_to_change():
    with pytest.raises(ConfigError, match=r"need 4 processes, not 12; set parallel.dp_shard=6"):
        ParallelConfig(dp_shard=2, ring=2).check(12)
    with pytest.raises(ConfigError, match=r"need 4 processes, not 6; start 4, or lower"):
        ParallelConfig(ring=4).check(6)


def test_ep_divides_the_fsdp_ranks():
    assert ParallelConfig(dp_shard=2, ring=2, ep=4).ep == 4
    with pytest.raises(ConfigError, match=r"parallel.ep=3 must divide .* = 4; choose one of \[1, 2, 4\]"):
        ParallelConfig(dp_shard=2, ring=2, ep=3)
