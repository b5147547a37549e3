"""Dropout by token: the mask depends on seed, step, layer, place, token and channel alone."""

import torch

from parallel.noise import TokenNoise

IDS = torch.arange(4096) * 7 + (3 << 32)


def mask(ids=IDS, *, layer=0, place=0, rate=0.25, width=64, **key):
    noise = TokenNoise.of(ids, **{"seed": 1, "step": 0, **key}, rate=rate).at(layer)
    return noise.drop(torch.ones(len(ids), width, dtype=torch.float64), place)


def test_the_share_that_is_dropped_and_the_scale():
    for rate in (0.1, 0.5, 0.9):
        x = mask(rate=rate)
        assert set(x.unique().tolist()) == {0.0, 1.0 / (1.0 - rate)}
        # Of 2^18 draws the share strays by less than 5 standard deviations.
        assert abs(float((x == 0).double().mean()) - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5


def test_rows_in_any_order_and_number_have_the_masks_of_their_tokens():
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))[:1000]
    assert torch.equal(mask(IDS[order]), mask()[order])
    noise = TokenNoise.of(IDS, seed=1, step=0, rate=0.25)
    part = noise.rows(4000, 200).at(0).drop(torch.ones(200, 64, dtype=torch.float64), 0)
    assert torch.equal(part[:96], mask()[4000:])


def test_everything_in_the_key_changes_half_of_what_may_change():
    one = mask(rate=0.5) == 0
    for other in (
        {"seed": 2},
        {"step": 1},
        {"layer": 1},
        {"place": 1},
        {"ids": IDS + 1},
        {"ids": IDS + (1 << 32)},
    ):
        share = float((one != (mask(rate=0.5, **other) == 0)).double().mean())
        assert abs(share - 0.5) < 0.005, other
    columns = one.double() - 0.5
    correlation = columns.T @ columns / len(IDS) * 4
    assert float((correlation - torch.eye(64)).abs().max()) < 6 / len(IDS) ** 0.5


def test_no_rate_and_no_rows_do_nothing():
    x = torch.randn(3, 4)
    assert TokenNoise.none().rows(1, 2).at(3).drop(x, 0) is x
    assert mask(IDS[:0]).shape == (0, 64)


def mixed(value: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    z = value & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


WORD, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def test_the_bits_are_those_of_the_published_hash():
    """A resumed run draws the same masks on any device, in any later version."""
    ids = [0, 1, (5 << 32) + 9]
    key, layer = mixed((mixed(7 + GOLDEN) ^ 3) + GOLDEN), mixed(2 + GOLDEN)
    rows = [mixed(mixed(token ^ key) ^ layer) for token in ids]
    expected = [
        [(mixed(row + (2 * c + 1) * GOLDEN) & 0xFFFFFFFF) >= 1 << 31 for c in range(12)] for row in rows
    ]
    found = mask(torch.tensor(ids), seed=7, step=3, layer=2, place=1, width=12, rate=0.5) != 0
    assert found.tolist() == expected
