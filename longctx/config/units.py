"""Lengths and sizes with units: `8k` tokens, `10GiB`."""

import re
from decimal import Decimal

TOKENS = {"k": 1024, "m": 1024**2, "g": 1024**3}
BYTES = {
    "b": 1,
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
}
UNITS = {"tokens": TOKENS, "bytes": BYTES}
EXAMPLES = {"tokens": "8192, 8k or 1M (1k = 1024 tokens)", "bytes": "10GiB, 512MB or a number of bytes"}
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]+)?")


def parse(text: str, unit: str) -> int:
    """The number of tokens or bytes that `text` says, e.g. `1.5k` tokens -> 1536.

    Args:
        text: a number with an optional unit; case of the unit does not matter.
        unit: `tokens` or `bytes`.

    Raises:
        ValueError: not a whole number of tokens or bytes; the message says what is expected.
    """
    match = _NUMBER.fullmatch(text.strip())
    suffix = (match.group(2) or "").lower() if match else ""
    if match is None or (suffix and suffix not in UNITS[unit]):
        raise ValueError(f"expected {EXAMPLES[unit]}")
    exact = Decimal(match.group(1).replace("_", "")) * UNITS[unit].get(suffix, 1)
    if exact != int(exact):
        raise ValueError(f"{text} is not a whole number of {unit}; expected {EXAMPLES[unit]}")
    return int(exact)


def format_tokens(count: int) -> str:
    """The shortest exact spelling of a length: 131072 -> `128k`, 1000 -> `1000`."""
    for suffix, scale in (("M", 1024**2), ("k", 1024)):
        if count and count % scale == 0:
            return f"{count // scale}{suffix}"
    return str(count)


def format_bytes(count: float) -> str:
    """A size for people: 85899345920 -> `80.0 GiB`, 3000000 -> `3 MiB`."""
    return f"{count / 1024**3:.1f} GiB" if count >= 1024**3 else f"{count / 1024**2:.0f} MiB"
