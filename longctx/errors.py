"""Errors a user can act on. Their messages say what is wrong, the values, and what to change."""

from parallel.errors import ConfigError as ConfigError


class FolderBusy(ConfigError):  # noqa: N818
    """A run is at work in the folder, whose files are its own."""


class DataError(ValueError):
    """A document source or a token store cannot be used."""


class OutOfData(DataError):  # noqa: N818
    """The sources have no further step to give. Draws depend on the step alone: every rank finds it there."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is incomplete or damaged."""


class TrainingDiverged(RuntimeError):  # noqa: N818
    """A loss or a gradient is no longer finite."""


class NoProgress(RuntimeError):  # noqa: N818
    """Starting again would not get further."""


class StateLost(NoProgress):
    """Neither a peer's memory nor a checkpoint has the state that a lost rank had."""


class ReplicasDiffer(RuntimeError):  # noqa: N818
    """Ranks that hold the same shards have different values in them."""
