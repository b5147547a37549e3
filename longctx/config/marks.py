"""Marks of fields that accept units. No torch here."""

from collections.abc import Mapping

TOKENS: Mapping[str, str] = {"unit": "tokens"}
"""Marks a length in tokens: `8k` means 8 x 1024 tokens."""
BYTES: Mapping[str, str] = {"unit": "bytes"}
"""Marks a size in bytes: `10GiB`, `512MB`."""
