"""Named errors for the collectives that torch makes by itself (FSDP's)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .comm import Group
from .errors import PeerLost

_LOST = ("connection closed", "connection reset", "timed out waiting", "broken pipe", "connection refused")
"""How gloo words the end of a peer; it has no error class of its own."""


@contextmanager
def lost_ranks_named(doing: str, group: Group) -> Iterator[None]:
    """Give torch's own collectives (FSDP's) the named error that our own have.

    Raises:
        PeerLost: a collective inside did not finish: a rank died, or was silent for the timeout.
    """
    try:
        yield
    except PeerLost:
        raise
    except RuntimeError as error:
        if not says_lost(error):
            raise
        detail = f"{doing} among ranks {list(group.ranks)} failed ({str(error).strip().splitlines()[0]})"
        raise PeerLost(axis=group.axis, rank=None, step=None, detail=detail) from error


def says_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, says that a peer is gone."""
    if error is None:
        return False
    if isinstance(error, PeerLost | dist.DistError):
        return True
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST):
        return True
    return says_lost(error.__cause__ or error.__context__)
