"""What longctx and the launcher that starts it agree on; docs/protocol.md is the text.

Launch holds the same constants; tests/test_protocol.py asserts that they agree.
"""

import json
import os
from pathlib import Path

DONE = 0
FAILED = 1
BAD_INPUT = 2
PREFLIGHT_FAILED = 3
REQUEUE = 64
NO_PROGRESS = 65

STATUS = "status.json"
"""In the run folder."""
STATUS_KEYS = ("exit_code", "rank", "error")
HEARTBEAT_KEYS = ("rank", "step", "phase", "progress")


def write_status(path: Path, exit_code: int, *, rank: int, error: str = "") -> bool:
    """Say how the job ended, unless another rank has said so already.

    The first word stands: a rank that fails by itself writes before its peers notice. The file
    appears whole or not at all.

    Returns:
        Whether this rank was the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"exit_code": exit_code, "rank": rank, "error": error})
    partial = path.with_name(f".{path.name}.{rank}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink()
