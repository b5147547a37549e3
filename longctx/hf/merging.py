"""Several models of one shape into their average, as weights that `init_from`, `export` and `sample` take."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoint.merge import average, check_mergeable
from ..errors import ConfigError
from .folder import COMPANIONS
from .importing import Imported, Tensor, check_space, write_weights
from .source import Source

FILE_BYTES = 5 << 30


def merge(sources: Sequence[Source], target: Path) -> Imported:
    """Average the parameters of several models.

    Args:
        sources: at least two, of one model.
        target: folder that does not exist yet.

    Raises:
        ConfigError: models that differ, or the target exists.
        CheckpointError: a file is damaged.
    """
    if len(sources) < 2:
        raise ConfigError("a merge needs at least two checkpoints; name more of them")
    check_mergeable([source.where for source in sources], [source.index for source in sources])
    first = sources[0]
    check_space(target, sum(stored.num_bytes for stored in first.index.tensors.values()))
    carried = {}
    if first.companions is not None:
        found = [first.companions / name for name in COMPANIONS]
        carried = {path.name: path.read_bytes() for path in found if path.is_file()}
    return write_weights(
        target,
        first.model,
        _files(sources),
        carried=carried,
        tokenizer=first.tokenizer,
        seq_len=first.seq_len,
    )


def _files(sources: Sequence[Source]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    filled = 0
    indices = [source.index for source in sources]
    for name, stored in indices[0].tensors.items():
        if group and filled + stored.num_bytes > FILE_BYTES:
            yield group
            group, filled = [], 0
        chunks = average(indices, name)
        group.append(Tensor(name=name, dtype=stored.dtype, shape=stored.shape, chunks=chunks))
        filled += stored.num_bytes
    yield group
