"""Whatever holds a model: a run, a checkpoint, an imported folder, a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..checkpoint.keeping import checkpoints_below, newest_good
from ..checkpoint.manifest import MANIFEST, check_small, open_checkpoint
from ..config.schema import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..tensors.folder import folder_at, is_url
from ..tensors.index import TensorIndex
from .folder import CONFIG, find_folder, open_hf

CARRIED = "hf"
"""Folder, inside an import or a run, with the Hugging Face files that are no weights."""
PARAMETERS = "model."
"""Prefix of parameters among a checkpoint's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model in files."""

    where: str
    """The folder that holds the weights."""
    model: ModelConfig
    """Its shape."""
    index: TensorIndex
    """Its parameters under our names."""
    companions: Path | None
    """Folder with config.json, tokenizer and generation settings of Hugging Face, where there is one."""
    tokenizer: str
    """As `data.tokenizer`: `bytes`, or a path."""
    seq_len: int
    """Longest sequence in tokens that it is meant for."""
    step: int
    """Optimizer steps behind it."""


def open_source(name: str) -> Source:
    """Open a model by the name of what holds it.

    Args:
        name: a run folder (its newest good checkpoint), a checkpoint, a folder of `longctx import`, a Hugging
            Face folder, or a hub id.

    Raises:
        ConfigError: there is no model, or it cannot be read.
        CheckpointError: its files are damaged.
    """
    path = name if is_url(name) else str(Path(name).expanduser())
    if folder_at(path).size(MANIFEST) is not None:
        return _of_checkpoint(path)
    checkpoints = checkpoints_below(path)
    if checkpoints:
        found = newest_good(checkpoints)
        if found is None:
            raise CheckpointError(f"{name}: none of its checkpoints is good; restore one of them")
        return _of_checkpoint(str(found), run=path)
    if is_url(name):
        raise ConfigError(f"{name} holds no checkpoint (no {MANIFEST}); name the checkpoint, or their folder")
    folder = find_folder(name)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{name} holds neither checkpoints of a run nor a model (no {MANIFEST}, no {CONFIG}); name a run "
            "folder, a checkpoint, an imported folder or a Hugging Face folder"
        )
    opened = open_hf(folder)
    return Source(
        where=str(folder),
        model=opened.model,
        index=opened.index,
        companions=folder,
        tokenizer=str(folder),
        seq_len=int(opened.config.get("max_position_embeddings") or 0),
        step=0,
    )


def read_model(section: dict[str, Any], where: str) -> ModelConfig:
    """The model section of a manifest.

    Raises:
        ConfigError: a key of another version.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), section)
        model: Any = OmegaConf.to_object(merged)
    except Exception as error:  # OmegaConf's own hierarchy
        raise ConfigError(f"{where}: its model section does not fit this version ({error})") from error
    assert isinstance(model, ModelConfig)
    return model


def _of_checkpoint(where: str, *, run: str | None = None) -> Source:
    opened = open_checkpoint(where)
    check_small(opened, f"{CARRIED}/")
    manifest = opened.manifest

    def ours(name: str) -> str | None:
        return name.removeprefix(PARAMETERS) if name.startswith(PARAMETERS) else None

    companions = None if is_url(run or where) else _companions(Path(run or where))
    if companions is None and not is_url(where):
        companions = _companions(Path(where))
    tokenizer = str(manifest["tokenizer"])
    if companions is not None and manifest["kind"] == "weights":  # the folder may have been moved
        tokenizer = str(companions)
    return Source(
        where=where,
        model=read_model(manifest["model"], where),
        index=opened.index.renamed(ours),
        companions=companions,
        tokenizer=tokenizer,
        seq_len=int(manifest["seq_len"]),
        step=int(manifest["step"]),
    )


def _companions(path: Path) -> Path | None:
    """In the import itself, or in the run folder above a checkpoint."""
    path = path.resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / CARRIED / CONFIG).is_file():
            return folder / CARRIED
    return None
