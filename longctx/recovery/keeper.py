"""From a run into a generation and back."""

from typing import Any

from ..build import Run
from ..checkpoint.shares import get_rng, put_rng, run_tensors
from .generations import DamagedError, Shelf, Slot, State, meta_of

Row = dict[str, Any]


class Keeper:
    """Packs the states of one run into a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._state: State | None = None
        self._packed = 0

    def pack(self, run: Run, row: Row | None) -> Slot:
        """Copy the run's state over the oldest generation; `row` is the metrics of its last step."""
        if self._packed < 2:  # FSDP may move its shards in the first forward
            self._state = State(run_tensors(run))
        self._packed += 1
        assert self._state is not None
        progress = run.progress
        meta = {
            "progress": [progress.step, progress.tokens, progress.skipped, progress.spikes],
            "rng": get_rng(),
            "mixture": run.mixture.state() if run.mixture else {},
            "watch": run.watch.state(),
            "row": row,
        }
        slot = self._shelf.oldest()
        self._state.pack(slot, meta, step=progress.step)
        return slot

    def restore(self, run: Run, step: int) -> Row | None:
        """Copy a generation into the run; returns the metrics of its last step.

        Raises:
            DamagedError: there is none, or it is of another layout.
        """
        slot = self._shelf.at(step)
        if slot is None:
            raise DamagedError(f"no state of step {step} is in memory")
        State(run_tensors(run)).unpack(slot)
        meta = meta_of(slot)
        progress = run.progress
        progress.step, progress.tokens, skipped, progress.spikes = meta["progress"]
        progress.skip(skipped)
        put_rng(meta["rng"])
        if run.mixture is not None:
            run.mixture.restore(meta["mixture"])
        run.watch.restore(meta["watch"])
        for slots in run.optimizer.state.values():
            slots["step"].fill_(progress.step)
        row: Row | None = meta["row"]
        return row

    def go_back(self, run: Run, *, further: bool) -> None:
        """Restore the newest generation, or the one before it, which is then the newest.

        What a run has learned about batches since stays: they are left out.

        Raises:
            DamagedError: there is no such generation.
        """
        steps = sorted(slot.step for slot in self._shelf.slots if slot.step is not None)
        if len(steps) < 1 + further:
            raise DamagedError("no earlier state is in memory")
        step, spikes = steps[-1 - further], run.progress.spikes
        run.loader.forget()
        self._shelf.drop_after(step)
        self.restore(run, step)
        run.progress.spikes = spikes
