"""Run a test function on several gloo ranks, forked from one warm server that has torch imported.

A rank starts in about 0.1 s instead of the seconds that importing torch costs. A rank that dies
is reported with its signal; of several failures the one that is not an echo of another rank's
death ("connection closed") comes first.
"""

import ctypes
import importlib.util
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

PR_SET_PDEATHSIG = 1
ECHOES = ("connection closed", "connection reset", "socket closed", "broken pipe", "peerlost")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.distributed.fsdp", "torch._dynamo", "ranks"]
)


class RankError(AssertionError):
    """One or more ranks failed; the message holds the first true cause."""


def load_function(path: str, name: str):
    """The module-level function `name` of the test file `path`, without needing a package."""
    module_name = f"_rank_test_{Path(path).stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)


def _serve(pipe: Connection, where: tuple[str, str], rank: int, size: int, job: tuple) -> None:
    import torch
    import torch.distributed as dist

    # The server dies with the test's process; a rank that computes on would take a core from the next run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    folder, args, init, seconds = job
    torch.set_num_threads(1)
    try:
        function = load_function(*where)
        if init:
            from datetime import timedelta

            store = dist.FileStore(os.path.join(folder, "store"), size)
            timeout = timedelta(seconds=seconds)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        pipe.send(("ok", _packed(function(rank, size, *args))))
        if init and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        pipe.close()
        os._exit(1)  # a rank in the middle of a collective must not wait for it while exiting
    pipe.close()


def _packed(value: object) -> bytes:
    """Bytes of a result; a tensor sent as it is would live in the memory of a rank that has ended."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> object:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def run_ranks(function, size: int, *args, timeout: float = 50.0, init: bool = True) -> list:
    """Call `function(rank, size, *args)` on `size` forked ranks.

    Args:
        function: a module-level function of a test file.
        size: number of ranks, one thread each.
        args: picklable arguments.
        timeout: seconds until the ranks are killed and the call fails.
        init: whether gloo's default process group is set up first (its timeout is `timeout`).

    Returns:
        The return values in rank order.

    Raises:
        RankError: a rank raised, died by a signal or did not answer.
    """
    where = (sys.modules[function.__module__].__file__, function.__name__)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            job = (folder, args, init, timeout)
            process = _CONTEXT.Process(target=_serve, args=(theirs, where, rank, size, job), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def start(function, *args) -> multiprocessing.Process:
    """Start `function(*args)` in a process of the warm server; the test kills it."""
    where = (sys.modules[function.__module__].__file__, function.__name__)
    process = _CONTEXT.Process(target=_call, args=(where, args), daemon=True)
    process.start()
    return process


def _call(where: tuple[str, str], args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    load_function(*where)(*args)


def _collect(pipes: list[Connection], processes: list, deadline: float) -> list:
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        # After the first failure the others get a moment to report theirs, then are killed.
        if failures:
            deadline = min(deadline, time.monotonic() + 2.0)
        ready = wait(list(waiting.values()), timeout=max(0.0, min(0.5, deadline - time.monotonic())))
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            pipe = waiting.pop(rank)
            try:
                kind, value = pipe.recv()
                (results if kind == "ok" else failures)[rank] = value
            except EOFError:
                processes[rank].join(5)
                failures[rank] = _death(processes[rank].exitcode)
    if failures or waiting:
        raise RankError(_report(failures, sorted(waiting)))
    return [_unpacked(results[rank]) for rank in range(len(pipes))]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no result"


def _report(failures: dict[int, str], silent: list[int]) -> str:
    def is_echo(item: tuple[int, str]) -> bool:
        return any(word in item[1].lower() for word in ECHOES)

    parts = [f"rank {rank}: {text}" for rank, text in sorted(failures.items(), key=is_echo)]
    if silent:
        parts.append(f"no answer from ranks {silent} (hung, or waiting for a failed rank)")
    return "\n".join(parts)
