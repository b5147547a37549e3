"""Errors of the parallel package. Their messages say what is wrong, the values, and what to change."""


class ConfigError(ValueError):
    """A setting cannot work; raised before any process group exists."""


class UnsupportedError(ConfigError):
    """Two settings that each work cannot be combined, e.g. a mask with an attention strategy."""


class PlanError(ValueError):
    """A step plan breaks one of its rules."""


class PeerLost(RuntimeError):
    """A collective failed because a peer of this rank is gone or does not answer."""

    def __init__(self, detail: str, *, axis: str, rank: int, step: int | None = None) -> None:
        self.axis = axis
        self.rank = rank
        self.step = step
        at = "" if step is None else f" step={step}"
        super().__init__(f"{detail} (axis={axis} rank={rank}{at})")
