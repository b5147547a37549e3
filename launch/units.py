"""Seconds and bytes as people write them."""

import re

SECONDS = {"unit": "seconds"}
BYTES = {"unit": "bytes"}
_TIME = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SIZE = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?")


def parse(text: object, unit: str) -> int:
    """A number of seconds or bytes from `90`, `90s`, `30m`, `4h`, `1-12:00:00`, `10GiB`.

    Args:
        text: as written; a number is taken as it stands.
        unit: `seconds` or `bytes`.

    Raises:
        ValueError: what would be accepted.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    words = str(text)
    clock = _CLOCK.fullmatch(words)
    if unit == "seconds" and clock:
        return _clock_seconds(*clock.groups())
    number = _NUMBER.fullmatch(words)
    units = _TIME if unit == "seconds" else _SIZE
    factor = units.get((number.group(2) or next(iter(units))).lower()) if number else None
    if number is None or factor is None:
        example = "90s, 30m, 4h, 2d or 1-12:00:00" if unit == "seconds" else "1048576, 64MiB or 10GiB"
        raise ValueError(f"{words!r} is no number of {unit}; write {example}")
    return round(float(number.group(1)) * factor)


def _clock_seconds(days: str | None, first: str, second: str, third: str | None) -> int:
    """Slurm's clocks: D-HH:MM[:SS], HH:MM:SS, or MM:SS."""
    if days is None and third is None:
        return int(first) * 60 + int(second)
    return int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + int(third or 0)


def clock(seconds: int) -> str:
    """Slurm's form of a time limit: `D-HH:MM:SS`, rounded up to a minute by Slurm itself."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"
