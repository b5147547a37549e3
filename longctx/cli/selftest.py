"""`longctx doctor --selftest`: the parity matrix on the devices at hand."""

import json
import os
import subprocess
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..protocol import DONE, FAILED, write_status
from .machine import visible_gpus
from .start import become_launcher, check_packages, under_torchrun

if TYPE_CHECKING:
    from ..build import World
    from ..selftest.cells import Cell
    from ..selftest.result import Result

CPU_PROCESSES = 8
SHARED_GPU_PROCESSES = 4


def selftest(options: Namespace) -> int:
    """One rank under torchrun; alone: write the corpus and start the ranks."""
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
    flags = [f"--{name}" for name in ("quick", "compile", "bf16", "json") if getattr(options, name)]
    become_launcher(
        [
            "local",
            f"--set=processes={processes}",
            f"--folder={folder}",
            "--",
            *("-m", "longctx", "doctor", "--selftest", f"--folder={folder}"),
            *(flags + ([f"--write={options.write}"] if options.write else [])),
        ]
    )


def _rank(options: Namespace) -> int:
    """One rank: run the cells that are left, print them on rank 0, write the page."""
    import torch

    from ..selftest.record import Record
    from ..selftest.run import run_cells

    torch.set_num_threads(1)
    world = _world()
    record = Record(options.folder, commit())
    cells = _cells(options, world)
    # Rank 0 alone reads the record: it also writes to it, while others may still be starting.
    if world.rank == 0:
        world.store.set("selftest-known", json.dumps(sorted(record.load())))
    known = set(json.loads(world.store.get("selftest-known")))
    results = [r for name, r in record.load().items() if name in {c.name for c in cells}]
    for result in run_cells([cell for cell in cells if cell.name not in known], options.folder, world):
        if world.rank == 0:
            results.append(result)
            record.add(result)
            word = "equal" if result.good else "DIFFERS"
            print(f"{word}  {result.error:.1e} {result.steps_error:.1e}  {result.cell.name}", flush=True)
    if world.rank != 0:
        return DONE
    if world.device.type == "cuda" and world.backend == "gloo":
        results += _alone_on_nccl(world, options.folder)
    order = [cell.name for cell in cells]
    last = len(order)
    return conclude(
        options, sorted(results, key=lambda r: order.index(r.cell.name) if r.cell.name in order else last)
    )


def _alone_on_nccl(world: "World", folder: Path) -> "list[Result]":
    """Ranks that share a GPU go through gloo, for NCCL wants one each: NCCL runs with one rank."""
    from torch.distributed import PrefixStore

    from ..selftest.cells import AXES, Cell
    from ..selftest.run import run_cells

    cell = Cell(degrees=(1,) * len(AXES), dtype="float32", batch="three", recompute="full")
    alone = replace(world, size=1, store=PrefixStore("nccl", world.store), backend=None)
    return list(run_cells([cell], folder, alone))


def _cells(options: Namespace, world: "World") -> "list[Cell]":
    from ..selftest.cells import compiled, matrix, pairwise, rounded

    cells = pairwise(world.size, fixed={"compile": False}) if options.quick else matrix(world.size)
    cells += compiled(world.size) if options.compile else []
    return cells + (rounded(world.size) if options.bf16 or world.device.type == "cuda" else [])


def conclude(options: Namespace, results: "list[Result]") -> int:
    """Print what was found, write the page and the status; the exit code says whether all were equal."""
    from ..selftest.record import summary
    from ..selftest.table import page, refusals

    bad = [r for r in results if not r.good]
    refused = refusals()
    for name, reason in refused.items():
        print(f"refused  {name}: {reason}")
    print(f"{len(results)} cells, {len(results) - len(bad)} equal, {len(bad)} not")
    error = f"{bad[0].cell.name}: {bad[0].error:.1e} in {bad[0].tensor}" if bad else ""
    if bad:
        print(f"first bad cell: {error}")
    if options.write:
        options.write.write_text(page(results, where=machine(), commit=commit()))
        print(f"wrote {options.write}")
    if options.json:
        print(json.dumps(summary(results, refused, where=machine(), commit=commit())), flush=True)
    code = FAILED if bad else DONE
    write_status(options.folder / "status.json", code, rank=0, error=error and f"self-test: {error}")
    return code


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


def machine() -> str:
    """What was measured on, for a page."""
    import torch

    gpus = torch.cuda.device_count()
    words = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"CPU, {os.cpu_count()} cores, gloo"
    return f"{words}, torch {torch.__version__}"


def commit() -> str:
    """The commit of this clone, with a plus where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    words = [[*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "--untracked-files=no"]]
    head, changed = (
        subprocess.run(w, capture_output=True, text=True, check=False).stdout.strip() for w in words
    )
    return (head + ("+" if changed else "")) or "unknown"
