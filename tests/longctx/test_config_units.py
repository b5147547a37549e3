"""Lengths and sizes with units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config.units import BYTES, TOKENS, format_bytes, format_tokens, parse


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("8k", "tokens", 8192),
        ("128K", "tokens", 131072),
        ("1M", "tokens", 1048576),
        ("1.5k", "tokens", 1536),
        ("8192", "tokens", 8192),
        ("131_072", "tokens", 131072),
        (" 4 k ", "tokens", 4096),
        ("10GiB", "bytes", 10 * 1024**3),
        ("512MB", "bytes", 512 * 10**6),
        ("80gib", "bytes", 80 * 1024**3),
        ("7", "bytes", 7),
    ],
)
def test_reads_units(text, unit, value):
    assert parse(text, unit) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("8q", "tokens"),
        ("", "tokens"),
        ("k", "tokens"),
        ("-8k", "tokens"),
        ("8GiB", "tokens"),
        ("8k", "bytes"),
    ],
)
def test_refuses_what_is_no_length_and_says_what_is(text, unit):
    with pytest.raises(ValueError, match="expected"):
        parse(text, unit)


def test_refuses_a_fraction_of_a_token():
    with pytest.raises(ValueError, match="not a whole number of tokens"):
        parse("1.0001k", "tokens")


@given(st.integers(min_value=0, max_value=10**15))
def test_a_formatted_length_reads_back(count):
    assert parse(format_tokens(count), "tokens") == count


@given(st.integers(0, 10**9), st.sampled_from(sorted(TOKENS)), st.booleans())
def test_every_token_unit_multiplies(count, suffix, upper):
    text = f"{count}{suffix.upper() if upper else suffix}"
    assert parse(text, "tokens") == count * TOKENS[suffix]


@given(st.integers(0, 10**9), st.sampled_from(sorted(BYTES)))
def test_every_byte_unit_multiplies(count, suffix):
    assert parse(f"{count}{suffix}", "bytes") == count * BYTES[suffix]


def test_binary_and_decimal_prefixes():
    assert BYTES["kib"] == 1024
    assert BYTES["kb"] == 1000
    assert BYTES["tib"] == 1024**4
    assert BYTES["tb"] == 10**12


def test_sizes_for_people():
    assert format_bytes(80 * 1024**3) == "80.0 GiB"
    assert format_bytes(3 * 1024**2) == "3 MiB"
