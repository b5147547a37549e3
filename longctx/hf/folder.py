"""A model folder of Hugging Face: finding it, its safetensors files, and the files beside them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..model.weights import our_names
from ..tensors.dtypes import check_dtype
from ..tensors.folder import LocalFolder
from ..tensors.header import read_header
from ..tensors.index import TensorIndex, index_pieces
from .architectures import model_config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are carried from import to export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """A model folder whose config and headers have been read and agree."""

    path: Path
    """The folder."""
    config: dict[str, Any]
    """config.json."""
    model: ModelConfig
    """As our model section."""
    index: TensorIndex
    """Its weights, under our names."""


def find_folder(source: str) -> Path:
    """The folder that a path, a hub cache entry or a hub id means.

    Raises:
        ConfigError: nothing is there; for a hub id the command that downloads it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _snapshot(path) or path
    if path.exists():
        raise ConfigError(f"{source} is a file; name the folder that holds it")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        cached = _snapshot(_hub_cache() / ("models--" + source.replace("/", "--")))
        if cached is not None:
            return cached
        raise ConfigError(
            f"{source} is not on this disk; download it with `hf download {source}` (package "
            "huggingface_hub), then repeat this command"
        )
    raise ConfigError(f"{source} does not exist; name a model folder, or a hub id such as Qwen/Qwen3-0.6B")


def open_hf(path: Path) -> HfModel:
    """Read config and headers of a model folder.

    Raises:
        ConfigError: an architecture without support, or tensors that the config does not describe.
        CheckpointError: a shard is missing, truncated or no safetensors file.
    """
    where = f"{path / CONFIG}"
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read ({error}); a model folder needs it") from error
    model = model_config(config, where)
    index = index_pieces(
        folder := LocalFolder(path),
        [piece for name in _weight_files(path) for piece in read_header(folder, name).pieces],
    )
    try:
        names = our_names({name: stored.shape for name, stored in index.tensors.items()}, model)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for theirs in names:
        check_dtype(index.tensors[theirs].dtype, f"{path}: {theirs}")
    return HfModel(path=path, config=config, model=model, index=index.renamed(names.get))


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        try:
            files = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
            strays = [name for name in files if Path(name).name != name]
            if strays:
                raise ValueError(f"{strays[0]} is no file name")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path / INDEX} is broken ({error!r}); download it again") from error
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise ConfigError(
                f"{path / missing[0]} is missing, {INDEX} names it ({len(missing)} of {len(files)} shards "
                "are missing); download the model again, finished parts are kept"
            )
        return files
    files = sorted(each.name for each in path.glob("*.safetensors"))
    if files:
        return [SINGLE] if SINGLE in files else files
    pickled = sorted(each.name for each in path.glob("*.bin"))
    if pickled:
        raise ConfigError(
            f"{path} has {pickled[0]} but no .safetensors; pickled weights are not read, because they can "
            "run code. Convert it with transformers: save_pretrained(..., safe_serialization=True)"
        )
    raise ConfigError(f"{path} holds no .safetensors file; name the folder that holds the weights")


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path("~/.cache/huggingface/hub").expanduser()
    return Path(HF_HUB_CACHE)


def _snapshot(path: Path) -> Path | None:
    """The current revision of an entry of the hub cache; None: the path is no such entry."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return None
    main = path / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = sorted(snapshots.iterdir(), key=lambda each: each.stat().st_mtime)
    return found[-1] if found else None
