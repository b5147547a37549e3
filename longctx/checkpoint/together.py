"""One rank's failure is every rank's error."""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel import comm

from ..build import Run
from ..errors import CheckpointError, ConfigError


@contextmanager
def together(run: Run, doing: str) -> Iterator[None]:
    """Leave only when all ranks have finished; where one fails, all raise its error.

    Raises:
        CheckpointError: of the first rank that failed, and what it was doing.
        ConfigError: where that is what it raised.
    """
    failure, kind = "", ""
    try:
        yield
    except ConfigError as error:
        failure, kind = str(error), "config"
    except CheckpointError as error:
        failure = f"rank {run.world.rank}: {error}"
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        failure = f"rank {run.world.rank}, {doing}: {error}"
    failures = [each for each in comm.gather_json([failure, kind], group=run.mesh.group("world")) if each[0]]
    if failures:
        raise ConfigError(failures[0][0]) if failures[0][1] else CheckpointError(failures[0][0])
