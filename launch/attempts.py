"""Attempts of one run, one JSON line each: what came out, and whether anything moved forward."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "launch/attempts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the program, or its end."""

    attempt: str
    """Job id and restart count."""
    time: float
    """Seconds since 1970."""
    later: int
    """0 for the first attempt of a submission, counting on from there."""
    progress: str
    """Name of the last file that shows progress; empty: none yet."""
    exit_code: int | None = None
    """None: this line says that it started."""


def append(folder: Path, attempt: Attempt) -> None:
    """Add a line."""
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def read(folder: Path) -> list[Attempt]:
    """All lines; one that a kill cut short is left out."""
    path, found = folder / FILE, []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def progress(folder: Path, pattern: str) -> str:
    """The last of the sorted names that match a pattern below the run folder."""
    return max((str(each.relative_to(folder)) for each in folder.glob(pattern)), default="")


def stuck(attempts: list[Attempt], now: str, limit: int) -> bool:
    """Whether the last `limit` starts of this submission all found what is there now."""
    starts = _since_submission([each for each in attempts if each.exit_code is None])
    return len(starts) >= limit and all(each.progress == now for each in starts[-limit:])


def failures(attempts: list[Attempt]) -> int:
    """Failed attempts of this submission since progress was last made."""
    ends = _since_submission([each for each in attempts if each.exit_code is not None])
    count = 0
    for each in reversed(ends):
        if each.exit_code in (0, 64) or each.progress != ends[-1].progress:
            break
        count += 1
    return count


def _since_submission(attempts: list[Attempt]) -> list[Attempt]:
    first = max((i for i, each in enumerate(attempts) if each.later == 0), default=0)
    return attempts[first:]
