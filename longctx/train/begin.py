"""A run that begins from weights instead of random numbers: `checkpoint.init_from`."""

from pathlib import Path
from typing import Any

from parallel import comm

from ..build import Run
from ..checkpoint import load_weights
from ..checkpoint.together import together
from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..files import write_bytes
from ..hf.folder import COMPANIONS
from ..hf.source import CARRIED, Source, open_source
from ..tensors.folder import folder_at
from ..tensors.index import index_from_json, index_to_json

_MUST_AGREE = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "norm_eps",
    "attention_bias",
    "qk_norm",
    "tied_embeddings",
    "vocab_size",
)
"""Keys that weights fix but whose change need not show in a shape; `rope` may be extended."""


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
            _check(source.model, run.config.model, name)
            _carry(source, Path(run.config.run.dir))
            found = [source.where, index_to_json(source.index)]
    where, tensors = comm.broadcast_json(found, src=0, group=run.mesh.group("world"))
    load_weights(index_from_json(folder_at(where), tensors), run)


def _check(theirs: ModelConfig, ours: ModelConfig, name: str) -> None:
    for key in _MUST_AGREE:
        if getattr(theirs, key) != getattr(ours, key):
            raise ConfigError(
                f"model.{key}={getattr(ours, key)}, but the weights of checkpoint.init_from={name} have "
                f"{getattr(theirs, key)}; set it to that, or compose the model.yaml of `longctx import`"
            )


def _carry(source: Source, run_folder: Path) -> None:
    """Keep tokenizer and settings with the run, so that `export` and `sample` have them."""
    for name in COMPANIONS if source.companions is not None else ():
        assert source.companions is not None
        path = source.companions / name
        if path.is_file():
            write_bytes(run_folder / CARRIED / name, path.read_bytes())
