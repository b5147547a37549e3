"""A run that begins from weights instead of random numbers: `checkpoint.init_from`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel import comm

from ..build import Run
from ..checkpoint import check_model, load_weights
from ..checkpoint.together import together
from ..files import write_bytes
from ..hf.folder import COMPANIONS
from ..hf.source import CARRIED, Source, open_source
from ..tensors.folder import folder_at
from ..tensors.index import index_from_json, index_to_json


def begin(run: Run, name: str) -> None:
    """Load weights into every rank's shards, and keep what belongs to them in the run folder.

    Args:
        run: built, at step 0.
        name: as `hf.source.open_source`.

    Raises:
        ConfigError: there is no model of that name, or the model section is of another one.
        CheckpointError: its files are damaged.
    """
    found: Any = None
    with together(run, f"checkpoint.init_from={name}"):
        if run.world.rank == 0:
            source = open_source(name)
            check_model(asdict(source.model), run.config.model, name)
            _carry(source, Path(run.config.run.dir))
            found = [source.where, index_to_json(source.index)]
    where, tensors = comm.broadcast_json(found, src=0, group=run.mesh.group("world"))
    load_weights(index_from_json(folder_at(where), tensors), run)


def _carry(source: Source, run_folder: Path) -> None:
    """Keep tokenizer and settings with the run, so that `export` and `sample` have them."""
    for name in COMPANIONS if source.companions is not None else ():
        assert source.companions is not None
        path = source.companions / name
        if path.is_file():
            write_bytes(run_folder / CARRIED / name, path.read_bytes())
