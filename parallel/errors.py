"""Named errors of the parallel package. Every message says what, the values, and what to change."""


class ConfigError(ValueError):
    """A setting or argument that cannot work; raised before any communication."""


class UnsupportedError(ConfigError):
    """A combination that a strategy or kernel cannot compute exactly, refused by name."""


class PlanError(ValueError):
    """A step plan that breaks one of its rules."""


class PeerLost(RuntimeError):  # noqa: N818  # noqa: N818 -- the name says what happened, as the design's tables use it
    """A peer did not take its part in a communication within the group's timeout.

    Args:
        axis: mesh axis of the group, e.g. "ring".
        rank: global rank of the peer that did not answer, or None when the backend does not say.
        step: position of the communication inside its operation (a ring hop), or None.
        detail: what was being done, and the backend's own words.
    """

    def __init__(self, *, axis: str, rank: int | None, step: int | None, detail: str) -> None:
        self.axis, self.rank, self.step, self.detail = axis, rank, step, detail
        who = "a peer" if rank is None else f"rank {rank}"
        where = "" if step is None else f", step {step}"
        super().__init__(f"lost {who} on axis {axis!r}{where}: {detail}")

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the keyword-only fields, so that a rank can hand the error to its parent."""
        return _peer_lost, (self.axis, self.rank, self.step, self.detail)


def _peer_lost(axis: str, rank: int | None, step: int | None, detail: str) -> PeerLost:
    return PeerLost(axis=axis, rank=rank, step=step, detail=detail)
