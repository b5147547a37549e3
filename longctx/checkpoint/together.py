"""One rank's failure is every rank's error."""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel import comm

from ..build import Run
from ..errors import CheckpointError


@contextmanager
def together(run: Run, doing: str) -> Iterator[None]:
    """Leave only when all ranks have finished; where one fails, all raise its error.

    Raises:
        CheckpointError: of the first rank that failed, and what it was doing.
    """
    failure = ""
    try:
        yield
    except CheckpointError as error:
        failure = f"rank {run.world.rank}: {error}"
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        failure = f"rank {run.world.rank}, {doing}: {error}"
    failures = [each for each in comm.gather_json(failure, group=run.mesh.group("world")) if each]
    if failures:
        raise CheckpointError(failures[0])
