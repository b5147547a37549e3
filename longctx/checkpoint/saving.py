"""From a run into a checkpoint, at once or behind the next steps."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel import comm

from ..build import Run
from ..errors import CheckpointError
from ..tensors.folder import Folder, Where, folder_at, is_url, read_whole, write_whole
from ..tensors.writer import Item, write_file
from .keeping import PARTIAL, latest_good, list_checkpoints, prunable, remove, step_at, step_name, sweep
from .manifest import MANIFEST, STATE, SUFFIX, write_manifest, write_small
from .shares import Share, Staging, get_rng, in_place, share_of
from .together import together

_POLL_S = (0.002, 0.2)
_GIB = 2**30


def checkpoints_folder(run: Run) -> Where:
    """Where the run's checkpoints lie."""
    configured = run.config.checkpoint.dir
    if configured == "auto":
        return Path(run.config.run.dir) / "ckpt"
    return configured if is_url(configured) else Path(configured)


def save(run: Run) -> Where:
    """Write one checkpoint of `run` at its current step and return when it is on disk; see `Saver.save`."""
    saver = Saver(run)
    path = saver.save()
    saver.wait()
    return path


@dataclass(kw_only=True, slots=True)
class _Job:
    """A checkpoint on its way."""

    where: Folder
    """Where files are written."""
    final: str
    """Name that the folder gets."""
    written: "Future[None]"
    """This rank's file is on disk."""
    committed: "Future[None]"
    """Rank 0: the checkpoint counts."""
    cancelled: threading.Event
    """Rank 0: nobody waits for the other ranks any more."""
    begun: float
    """Clock at its start."""


class Saver:
    """Writes the checkpoints of one run; every method is called by all ranks together.

    With `checkpoint.background` a save returns once this rank's share is copied to host memory; a
    thread writes it, and rank 0's waits for everybody's files before the checkpoint counts. Threads
    make no collective, so training's own are undisturbed. Errors are told at the next call.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = folder_at(checkpoints_folder(run))
        self._share: Share | None = None
        self._staging = Staging()
        self._job: _Job | None = None
        self.seconds = 0.0
        """Rank 0: what the newest save took until it counted; 0: there was none."""

    def save(self, *, background: bool = False) -> Where:
        """Write the run's present state.

        Returns:
            The checkpoint's path. In the background it is complete only after `wait`.

        Raises:
            CheckpointError: a rank could not write, now or in the save before (on every rank).
                Earlier checkpoints are untouched and nothing half-written is left behind.
        """
        self.wait()
        run, begun = self._run, time.perf_counter()
        name = step_name(run.progress.step)
        target = self._folder.folder(name)
        with together(run, f"looking for {target.where}"):
            present = target.size(MANIFEST) is not None
        if present:
            return target.where
        if self._share is None:
            self._share = share_of(run)
        where = self._folder.folder(f".{name}{PARTIAL}") if self._folder.renames else target
        with self._cleaned_up(where):
            with together(run, f"preparing {where.where}"):
                if run.world.rank == 0:
                    self._prepare(where)
            with together(run, f"staging {where.where}"):
                items = self._staging.copy(run, self._share) if background else in_place(run, self._share)
        self._job = self._start(where, name, items, begun=begun)
        if not background:
            self.wait()
        return target.where

    def wait(self) -> None:
        """Return when the last save has succeeded.

        Raises:
            CheckpointError: it has not (on every rank).
        """
        job = self._job
        if job is None:
            return
        try:
            self._await(job)
        except CheckpointError:
            self._job = None
            raise
        self._job = None  # not where a rank is lost meanwhile: the threads are still there, see `abandon`

    def _await(self, job: _Job) -> None:
        with self._cleaned_up(job.where):
            try:
                with together(self._run, f"writing tensors to {job.where.where}"):
                    job.written.result()
            except CheckpointError:
                job.cancelled.set()
                if self._run.world.rank == 0:
                    job.committed.exception()  # until the thread is gone
                raise
            with together(self._run, f"writing the manifest of {job.where.where}"):
                job.committed.result()

    def forget(self, after: int) -> Where | None:
        """Delete the checkpoints of steps after `after`, which are done again differently.

        Returns:
            The newest that is left.

        Raises:
            CheckpointError: one could not be deleted, or the save under way failed (on every rank).
        """
        self.wait()
        with together(self._run, f"deleting checkpoints after step {after} in {self._folder.where}"):
            if self._run.world.rank == 0:
                for path in list_checkpoints(self._folder.where):
                    if step_at(path) > after:
                        remove(path)
        return self.newest()

    def newest(self) -> Where | None:
        """The newest checkpoint, as rank 0 sees it."""
        found = list_checkpoints(self._folder.where) if self._run.world.rank == 0 else []
        told = str(found[-1]) if found else None
        newest: str | None = comm.broadcast_json(told, src=0, group=self._run.mesh.group("world"))
        return newest

    def abandon(self) -> None:
        """Give up a save whose ranks are not all there any more; it may still complete."""
        if self._job is not None:
            pulse = self._run.pulse
            phase, pulse.phase = pulse.phase, "checkpoint"  # which may take its time
            self._job.cancelled.set()
            self._job.written.exception()  # nobody writes to its files after this
            self._job.committed.exception()
            self._job, pulse.phase = None, phase

    def _cleaned_up(self, where: Folder) -> "_CleanedUp":
        return _CleanedUp(self._run, where, self._folder)

    def _prepare(self, where: Folder) -> None:
        assert self._share is not None
        sweep(self._folder)
        need, free = self._share.num_bytes, self._folder.free_bytes()
        if free is not None and free < need:
            raise OSError(
                f"{self._folder.where} has {free / _GIB:.2f} GiB free, a checkpoint needs "
                f"{need / _GIB:.2f} GiB; free some space, lower checkpoint.keep or set checkpoint.dir to "
                "another disk"
            )
        where.make()

    def _start(self, where: Folder, final: str, items: list[Item], *, begun: float) -> _Job:
        run = self._run
        job = _Job(
            where=where,
            final=final,
            written=Future(),
            committed=Future(),
            cancelled=threading.Event(),
            begun=begun,
        )
        coded = run.config.checkpoint.codec == "zstd"
        state, rng, rank = self._state(), get_rng(), run.world.rank

        def write() -> None:
            name = f"rank-{rank}{SUFFIX}"
            record = write_file(where, name, items, coded=coded).record() | {"rng": rng}
            write_whole(where, _record(rank), json.dumps(record).encode())

        def work() -> None:
            _into(job.written, write)
            if rank != 0 or job.written.exception() is not None:
                job.committed.set_result(None)
                return
            _into(job.committed, lambda: self._commit(job, state))

        threading.Thread(target=work, name="checkpoint", daemon=True).start()
        return job

    def _state(self) -> dict[str, Any]:
        run = self._run
        return {
            "step": run.progress.step,
            "tokens": run.progress.tokens,
            "skipped": run.progress.skipped,
            "spikes": run.progress.spikes,
            "watch": run.watch.state(),
            "optimizer_step": run.progress.step,
            "mixture": run.mixture.state() if run.mixture else {},
        }

    def _commit(self, job: _Job, state: dict[str, Any]) -> None:
        """Rank 0: wait for every rank's file, then state, manifest, and the name under which it counts."""
        assert self._share is not None
        config, where = self._run.config, job.where
        records = [_await_record(where, rank, job.cancelled) for rank in range(self._run.world.size)]
        state = state | {"rng": [record.pop("rng") for record in records]}
        files = {f"rank-{rank}{SUFFIX}": record for rank, record in enumerate(records)}
        files[STATE] = write_small(where, STATE, json.dumps(state).encode())
        for rank in range(len(records)):
            where.remove(_record(rank))
        body = {
            "kind": "run",
            "step": state["step"],
            "codec": config.checkpoint.codec,
            "model": asdict(config.model),
            "seq_len": config.data.seq_len,
            "tokenizer": config.data.tokenizer,
            "tensors": self._share.tensors,
            "files": files,
        }
        write_manifest(where, body)
        if self._folder.renames:
            self._folder.remove(job.final)  # one that has lost its manifest
            self._folder.publish(f".{job.final}{PARTIAL}", job.final)
        keep, every = config.checkpoint.keep, config.checkpoint.milestone_every
        for old in prunable(list_checkpoints(self._folder.where), keep=keep, milestone_every=every):
            remove(old)
        self.seconds = time.perf_counter() - job.begun


class _CleanedUp:
    """Removes a save that failed, and adds to its error what there still is."""

    def __init__(self, run: Run, where: Folder, folder: Folder) -> None:
        self._run, self._where, self._folder = run, where, folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, CheckpointError):
            return
        kept = None
        if self._run.world.rank == 0:
            self._where.remove()
            kept = latest_good(self._folder.where)
        kept = comm.broadcast_json(kept and str(kept), src=0, group=self._run.mesh.group("world"))
        raise CheckpointError(f"{error}; last good checkpoint: {kept or 'none'}") from error


def _record(rank: int) -> str:
    return f"rank-{rank}.json"


def _into(future: "Future[None]", work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _await_record(folder: Folder, rank: int, cancelled: threading.Event) -> dict[str, Any]:
    pause, longest = _POLL_S
    while folder.size(_record(rank)) is None:
        pause = min(2 * pause, longest)
        if cancelled.wait(pause):
            raise CheckpointError(f"the save was given up: rank {rank} did not write its file")
    record: dict[str, Any] = json.loads(read_whole(folder, _record(rank)))
    return record
