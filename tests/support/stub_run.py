"""Plays torchrun with one worker: `stub_run.py -m torch.distributed.run [options] FOLDER MODE ...`.

Every worker appends a line about itself to FOLDER/ran.jsonl; the first one also ends as MODE says: `done`,
`again:N` (64 with progress until attempt N), `stuck` (64 without progress), `fail`, `bad` (2), `sleep`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    words = sys.argv[3:]
    options = []
    while words[0].startswith("-"):
        options.append(words.pop(0))
        if options[-1] in ("--tee", "--local-ranks-filter"):
            options.append(words.pop(0))
    folder, mode, *rest = words
    rank = int(os.environ["SLURM_PROCID"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    line = {
        "node": os.environ["SLURMD_NODENAME"],
        "rank": rank,
        "job": os.environ["SLURM_JOB_ID"],
        "restart": restart,
        "argv": rest,
        "options": options,
        "env": {name: value for name, value in os.environ.items() if name.startswith("TEST_")},
    }
    with open(f"{folder}/ran.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"rank {rank} speaks", flush=True)
    act(Path(folder), mode, rank)


def act(folder: Path, mode: str, rank: int) -> None:
    if mode == "sleep":
        signal.signal(signal.SIGUSR1, lambda *_: finish(folder, rank, 64))
        time.sleep(60)
    name, _, count = mode.partition(":")
    attempts = len([1 for line in (folder / "ran.jsonl").read_text().splitlines() if '"rank": 0' in line])
    if name == "again" and rank == 0:
        (folder / "ckpt" / f"step-{attempts:08d}").mkdir(parents=True, exist_ok=True)
        finish(folder, rank, 0 if attempts >= int(count) else 64)
    code = {"done": 0, "stuck": 64, "fail": 1, "bad": 2}.get(name, 0)
    if name == "fail" and rank != 0:
        time.sleep(1)
    finish(folder, rank, code)


def finish(folder: Path, rank: int, code: int) -> None:
    if rank == 0:
        error = "ValueError: broken" if code == 1 else ""
        (folder / "status.json").write_text(json.dumps({"exit_code": code, "rank": 0, "error": error}))
    os._exit(int(code != 0))


main()
