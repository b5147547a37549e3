"""`longctx doctor`: does this machine compute what one process computes, and with which kernels?"""

import os
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..protocol import BAD_INPUT, DONE, FAILED
from .arguments import make_parser
from .machine import visible_gpus
from .start import become_launcher, check_packages, under_torchrun

if TYPE_CHECKING:
    from ..build import World
    from ..selftest.run import Result


CPU_PROCESSES = 8
SHARED_GPU_PROCESSES = 4
FOLDER = "selftest"


def run(argv: Sequence[str]) -> int:
    """Run the self-test, on all GPUs or on CPU processes."""
    parser = make_parser("doctor", "Checks of this machine.")
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
    parser.add_argument("--processes", type=int, default=0, help="ranks; 0: the GPUs, or 8 on CPU")
    parser.add_argument("--write", type=Path, help="write the page docs/parity.md here")
    parser.add_argument("--folder", type=Path, help="where the self-test's corpus and logs lie")
    options = parser.parse_args(list(argv))
    if options.kernels:
        from .kernels import table

        print("\n".join(table()))
        return DONE
    if not options.selftest:
        parser.print_help()
        return BAD_INPUT
    if under_torchrun():
        return _rank(options)
    check_packages()
    gpus = len(visible_gpus())
    processes = options.processes or (CPU_PROCESSES if gpus == 0 else max(gpus, SHARED_GPU_PROCESSES))
    if processes < 1:
        raise ConfigError(f"--processes={processes}; choose at least 1")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="longctx-selftest-"))
    from ..selftest.cells import write_corpus

    write_corpus(folder / "docs")
    print(f"self-test on {processes} processes, {gpus} GPUs, below {folder}", flush=True)
    arguments = [a for a in argv if not a.startswith("--folder")]
    become_launcher(
        [
            "local",
            f"--processes={processes}",
            "--port=0",
            f"--status={folder / 'status.json'}",
            f"--log={folder / 'torchrun.log'}",
            "--",
            "-m",
            "longctx",
            "doctor",
            *arguments,
            f"--folder={folder}",
        ]
    )


def _rank(options: Namespace) -> int:
    """One rank: run the cells, print them on rank 0, write the page."""
    import torch

    from ..protocol import write_status
    from ..selftest.cells import compiled, matrix, pairwise
    from ..selftest.run import run_cells

    torch.set_num_threads(1)
    world = _world()
    cells = pairwise(world.size, fixed={"compile": False}) if options.quick else matrix(world.size)
    cells += compiled(world.size) if options.compile else []
    results = []
    for result in run_cells(cells, options.folder, world):
        results.append(result)
        if world.rank == 0:
            word = "equal" if result.good else "DIFFERS"
            print(f"{word}  {result.error:.1e} {result.steps_error:.1e}  {result.cell.name}", flush=True)
    bad = [r for r in results if not r.good]
    code = FAILED if bad else DONE
    if world.rank == 0:
        _conclude(options, results)
        error = f"self-test: {bad[0].cell.name} differs in {bad[0].tensor}" if bad else ""
        write_status(options.folder / "status.json", code, rank=0, error=error)
    return code


def _conclude(options: Namespace, results: "list[Result]") -> None:
    from ..selftest.table import page, refusals

    bad = [r for r in results if not r.good]
    print(f"{len(results)} cells, {len(results) - len(bad)} equal, {len(bad)} not")
    for name, reason in refusals().items():
        print(f"refused  {name}: {reason}")
    if bad:
        print(f"first bad cell: {bad[0].cell.name}: {bad[0].error:.1e} in {bad[0].tensor}")
    if options.write:
        options.write.write_text(page(results, where=_machine(), commit=_commit()))
        print(f"wrote {options.write}")


def _world() -> "World":
    """All ranks; on a machine with fewer GPUs than ranks they share one through gloo."""
    from datetime import timedelta

    import torch
    from torch.distributed.rendezvous import rendezvous

    from ..build import World

    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(timedelta(seconds=600))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    backend = "gloo" if gpus < size else None
    return World(rank=rank, size=size, device=device, store=store, timeout_s=120.0, backend=backend)


def _machine() -> str:
    import torch

    gpus = torch.cuda.device_count()
    words = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"CPU, {os.cpu_count()} cores, gloo"
    return f"{words}, torch {torch.__version__}"


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
