"""A few processes that tokenize chunks, each one chunk at a time.

Processes come from a fork server, so they inherit no threads and no torch. Each owns one pipe: when
the parent dies, however it dies, the pipe ends and so does the process. Ctrl-C reaches only the
parent, which stops the others.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ..errors import DataError
from .chunks import Chunk, Skip
from .shards import save_shard, tokenize_chunk
from .tokenizers import Tokenizer, load_tokenizer

Job = tuple[Chunk, Path]
Result = tuple[Chunk, tuple[Skip, ...]]


def tokenize_all(
    jobs: Iterable[Job], *, tokenizer: Tokenizer, text_key: str, workers: int
) -> Iterator[Result]:
    """Tokenize chunks into shards, in parallel.

    Args:
        jobs: chunks and the shard files to write; drawn as processes become free.
        tokenizer: loaded again by each process, by its name.
        text_key: key of the text in a JSON line.
        workers: processes; with 1 this process does the work.

    Yields:
        Each chunk with what it skipped, as they finish.

    Raises:
        DataError: the disk is full, or a process died.
    """
    if workers == 1:
        for chunk, path in jobs:
            shard = tokenize_chunk(chunk, text_key, tokenizer)
            save_shard(path, shard)
            yield chunk, shard.skipped
        return
    with _started(workers, tokenizer.name, text_key) as processes:
        yield from _feed(iter(jobs), processes)


@contextmanager
def _started(workers: int, tokenizer: str, text_key: str) -> Iterator[dict[Connection, ForkServerProcess]]:
    context = multiprocessing.get_context("forkserver")
    processes: dict[Connection, ForkServerProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, tokenizer, text_key), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        yield processes
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _feed(jobs: Iterator[Job], processes: dict[Connection, ForkServerProcess]) -> Iterator[Result]:
    working: dict[Connection, Chunk] = {}
    idle = list(processes)
    while True:
        while idle and (job := next(jobs, None)) is not None:
            pipe = idle.pop()
            with suppress(BrokenPipeError):  # it died: its pipe ends, which is read as the answer
                pipe.send(job)
            working[pipe] = job[0]
        if not working:
            return
        ready = wait(list(working))
        for pipe in [pipe for pipe in working if pipe in ready]:
            chunk = working.pop(pipe)
            yield chunk, _answer(pipe, processes[pipe], chunk)
            idle.append(pipe)


def _answer(pipe: Connection, process: ForkServerProcess, chunk: Chunk) -> tuple[Skip, ...]:
    try:
        kind, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise DataError(
            f"the process that tokenized {chunk.files[0].name} died (exit code {process.exitcode}; -9 is "
            f"usually out of memory); lower data.workers and run it again, it goes on from there"
        ) from None
    if kind == "ok":
        skipped: tuple[Skip, ...] = value
        return skipped
    if kind == "data":
        raise DataError(value)
    raise RuntimeError(f"tokenizing {chunk.files[0].name} failed:\n{value}")


def _serve(pipe: Connection, tokenizer: str, text_key: str) -> None:
    """Body of a process: chunks in, shards on disk, what was skipped out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loaded = load_tokenizer(tokenizer)
    while True:
        try:
            chunk, path = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        answer: tuple[str, Any]
        try:
            shard = tokenize_chunk(chunk, text_key, loaded)
            save_shard(path, shard)
            answer = ("ok", shard.skipped)
        except DataError as error:
            answer = ("data", str(error))
        except Exception:
            answer = ("error", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:  # nobody listens any more; the chunk is on disk
            os._exit(0)
