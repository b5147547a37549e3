"""`longctx doctor`: what this machine has, and whether it computes what one process computes."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import DONE
from .arguments import make_parser
from .machine import installed_gpus, visible_gpus


def run(argv: Sequence[str]) -> int:
    """Describe the machine, its kernels, or run the self-test on all GPUs or on CPU processes."""
    options = _options(argv)
    if options.kernels:
        from .kernels import table

        print("\n".join(table()))
        return DONE
    if options.selftest:
        from .selftest import selftest

        return selftest(options)
    found = machine() | {"host": host()}
    print(
        json.dumps(found) if options.json else "\n".join(f"{key:<12} {_words(v)}" for key, v in found.items())
    )
    return DONE


def _options(argv: Sequence[str]) -> Namespace:
    parser = make_parser("doctor", "Checks of this machine: versions, devices and collectives, or a test.")
    parser.usage = "longctx doctor [options]"
    parser.add_argument("--json", action="store_true", help="one JSON line, last")
    parser.add_argument(
        "--selftest", action="store_true", help="every combination of axes against one process, both dtypes"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="attention kernels, best first, each with the reason"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a cover of all pairs instead of the whole matrix"
    )
    parser.add_argument("--compile", action="store_true", help="also compiled blocks; minutes more")
    parser.add_argument("--bf16", action="store_true", help="also bfloat16, which GPUs always test")
    parser.add_argument("--processes", type=int, default=0, help="ranks; 0: the GPUs, or 8 on CPU")
    parser.add_argument("--write", type=Path, help="write the page docs/parity.md here")
    parser.add_argument(
        "--folder",
        type=Path,
        help="corpus, logs and results of the self-test; the same folder again continues a test cut short",
    )
    return parser.parse_args(list(argv))


def host() -> dict[str, Any]:
    """What the launcher finds out about this machine without torch: disks, clock, names, GPUs' health."""
    command = [sys.executable, "-m", "launch", "doctor", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout)
    return dict(answer["facts"]) | {"problems": answer["problems"]}


def machine() -> dict[str, Any]:
    """Versions, devices, and what ranks would communicate through."""
    import os
    import platform

    import torch
    import torch.distributed as dist

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    sizes = visible_gpus() if names else []
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
    if not nccl:
        nccl = "not in this build of torch: GPUs would communicate through gloo and host memory"
    elif not names:
        nccl += ", unused without a GPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores",
        "devices": [
            f"{name}, {size / 2**30:.0f} GiB" if size else name
            for name, size in zip(names, [*sizes, *[None] * len(names)], strict=False)
        ],
        "hidden_gpus": len(installed_gpus()) - len(names),
        "nccl": nccl,
        "gloo": dist.is_gloo_available(),
    }


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items() if key != "versions")
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "no GPU"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
