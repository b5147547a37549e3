"""What a run does about a loss spike: stop, leave the batch out, or go back and leave it out."""

from ..build import Run
from ..errors import NoProgress, TrainingDiverged
from ..recovery.members import Members
from ..spike import LossSpike
from .run_folder import RunFolder

NAMED = 8
"""Documents of a batch that a message lists; the event has all."""


def answer(run: Run, spike: LossSpike, members: Members, folder: RunFolder) -> bool:
    """Answer a spike of the step under way; all ranks call it, with the same spike.

    Returns:
        Whether steps that are done will be done again with other batches.

    Raises:
        TrainingDiverged: with train.on_spike=stop.
        NoProgress: more spikes than train.max_spikes.
    """
    config, progress = run.config.train, run.progress
    batch, step = progress.batch(), progress.step
    documents = run.loader.documents(batch)
    named = ", ".join(documents[:NAMED])
    what = f"step {step + 1}: {spike}; parameters were not updated. Documents of the step: {named}"
    if config.on_spike == "stop":
        raise TrainingDiverged(f"{what}. Lower train.lr and resume, or set train.on_spike=skip or rewind")
    progress.spikes += 1
    if progress.spikes > config.max_spikes:
        raise NoProgress(f"{what}. {config.max_spikes} spikes were answered before (train.max_spikes)")
    skipped, further = [batch], False
    if config.on_spike == "rewind":
        # The batch before was left out at this very step, and this one is no better: the weights are hurt.
        answered = set(progress.skipped) - set(config.skip_batches)
        further = batch - 1 in answered and members.older(run)
        members.go_back(run, further=further)
        if further:
            skipped = list(range(progress.batch(), batch + 1))
    progress.skip(skipped)
    details = {"batch": batch, "skipped": skipped, "back_to": progress.step, "documents": documents}
    folder.event("spike", step=step + 1, reason=str(spike), **details)
    if run.world.rank == 0:
        print(f"{what}. Left out: batches {skipped}; going on from step {progress.step}", flush=True)
    return further
