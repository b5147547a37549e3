"""Weights of others into a checkpoint of ours: renamed, streamed, byte for byte."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.manifest import SUFFIX, write_manifest, write_small
from ..config.schema import ModelConfig
from ..config.units import format_bytes
from ..errors import ConfigError
from ..model.params import vocab_rows
from ..tensors.dtypes import LONG_NAMES
from ..tensors.folder import Folder, LocalFolder
from ..tensors.header import Piece
from ..tensors.index import TensorIndex, stream
from ..tensors.writer import Chunk, Item, write_file
from .added import GROWN, AddedTokens, add_tokens, grown_rows, vocabulary_size
from .folder import COMPANIONS, CONFIG, TOKENIZER, HfModel
from .source import CARRIED, PARAMETERS

FRAGMENT = "model.yaml"
"""Configuration that trains on from an import."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A parameter that is going to be written."""

    name: str
    """Ours."""
    dtype: str
    """As in files."""
    shape: tuple[int, ...]
    """Of the whole."""
    chunks: Iterator[Chunk]
    """Its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import has written."""

    path: Path
    """The folder."""
    model: ModelConfig
    """Its model section."""
    num_bytes: int
    """Bytes of the weights."""


def import_hf(source: HfModel, target: Path, *, tokens: Path | None = None) -> Imported:
    """Write a Hugging Face model as weights of ours, one block in memory at a time.

    Args:
        source: opened model folder.
        target: folder that does not exist yet.
        tokens: text file with a new token per line.

    Raises:
        ConfigError: the tokenizer has more ids than the model has rows, or the target exists.
        CheckpointError: a file is damaged.
    """
    check_tokenizer(source)
    check_space(target, sum(stored.num_bytes for stored in source.index.tensors.values()))
    added = add_tokens(tokens, source.path, source.model) if tokens else None
    model = added.model if added else source.model
    found = [source.path / name for name in COMPANIONS]
    carried = {path.name: path.read_bytes() for path in found if path.is_file()}
    if added:
        carried[TOKENIZER] = added.tokenizer
    return write_weights(
        target,
        model,
        _by_file(source.index, added),
        carried=carried,
        tokenizer="bytes",
        seq_len=int(source.config.get("max_position_embeddings") or 0),
    )


def check_tokenizer(source: HfModel) -> None:
    """Refuse a tokenizer that has ids without a row.

    Raises:
        ConfigError: with both sizes.
    """
    path, rows = source.path / TOKENIZER, vocab_rows(source.model)
    if path.is_file() and (size := vocabulary_size(path)) > rows:
        raise ConfigError(
            f"{path} has ids up to {size - 1}, {source.path / CONFIG} has vocab_size={rows}; take the "
            "tokenizer that belongs to the weights, or save the model with resized embeddings first"
        )


def check_space(target: Path, need: int) -> None:
    """Refuse to begin where the result will not fit.

    Raises:
        ConfigError: with both sizes.
    """
    free = LocalFolder(target.absolute().parent).free_bytes()
    if free < need:
        raise ConfigError(
            f"{target.absolute().parent} has {format_bytes(free)} free, {format_bytes(need)} are needed; "
            "free some space, or name a target on another disk"
        )


def write_weights(
    target: Path,
    model: ModelConfig,
    files: Iterator[list[Tensor]],
    *,
    carried: Mapping[str, bytes],
    tokenizer: str,
    seq_len: int,
) -> Imported:
    """Write a checkpoint of weights alone; it appears when it is complete.

    Args:
        target: folder that does not exist yet.
        model: what the weights are of.
        files: the tensors of each file; their bytes are asked for in order.
        carried: Hugging Face's other files by name.
        tokenizer: as `data.tokenizer`, where none is carried.
        seq_len: longest sequence in tokens that the model is meant for.

    Raises:
        ConfigError: the target exists.
    """
    with fresh_folder(target) as folder:
        entries: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for number, group in enumerate(files, start=1):
            written = write_file(folder, f"weights-{number:05d}{SUFFIX}", [_item(each) for each in group])
            entries[written.file] = written.record()
            for each in group:
                described = {"shape": list(each.shape), "dtype": LONG_NAMES[each.dtype]}
                tensors[PARAMETERS + each.name] = described
        for name, content in carried.items():
            entries[f"{CARRIED}/{name}"] = write_small(folder, f"{CARRIED}/{name}", content)
        if TOKENIZER in carried:
            tokenizer = str(target / CARRIED / TOKENIZER)
        fragment = _fragment(model, target, tokenizer)
        entries[FRAGMENT] = write_small(folder, FRAGMENT, fragment.encode())
        body = {"kind": "weights", "step": 0, "model": asdict(model), "seq_len": seq_len}
        body |= {"tokenizer": tokenizer, "tensors": tensors, "files": entries}
        write_manifest(folder, body)
    num_bytes = sum(entry["bytes"] for name, entry in entries.items() if name.endswith(SUFFIX))
    return Imported(path=target, model=model, num_bytes=num_bytes)


@contextmanager
def fresh_folder(target: Path) -> Iterator[Folder]:
    """A new folder that appears under its name when it is left without error; nothing is overwritten.

    Raises:
        ConfigError: there is something of that name, or no right to write beside it.
    """
    place = Path(os.path.abspath(target))  # `.` and `new/..` have names too
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{target} exists already and is not overwritten; name a new folder")
    partial = f".{place.name}.partial"
    parent = LocalFolder(place.parent)
    folder = parent.folder(partial)
    try:
        folder.make()
        yield folder
        parent.publish(partial, place.name)
    except OSError as error:
        folder.remove()
        raise ConfigError(f"{target} cannot be written ({error}); free space, or name another") from error
    except BaseException:
        folder.remove()
        raise


def _by_file(index: TensorIndex, added: AddedTokens | None) -> Iterator[list[Tensor]]:
    """The tensors in the files they come in, so that memory and time follow the source's shards."""
    files: dict[str, list[str]] = {}
    for name, stored in index.tensors.items():
        files.setdefault(stored.pieces[0].file, []).append(name)
    for names in files.values():
        yield [_tensor(index, name, added) for name in names]


def _tensor(index: TensorIndex, name: str, added: AddedTokens | None) -> Tensor:
    stored = index.tensors[name]
    if added is None or name not in GROWN:
        return Tensor(name=name, dtype=stored.dtype, shape=stored.shape, chunks=stream(index, name))
    shape = (vocab_rows(added.model), *stored.shape[1:])
    return Tensor(name=name, dtype=stored.dtype, shape=shape, chunks=grown_rows(index, name, added))


def _item(tensor: Tensor) -> Item:
    piece = Piece(
        name=PARAMETERS + tensor.name,
        file="",
        start=0,
        num_bytes=0,
        dtype=tensor.dtype,
        offset=(0,) * len(tensor.shape),
        shape=tensor.shape,
    )
    return Item(piece=piece, chunks=tensor.chunks)


def _fragment(model: ModelConfig, target: Path, tokenizer: str) -> str:
    content: dict[str, Any] = {"model": _plain(asdict(model)), "data": {"tokenizer": tokenizer}}
    content["checkpoint"] = {"init_from": str(target)}
    head = "# Trains on from these weights: longctx train quickstart THIS_FILE data.path=...\n"
    return head + yaml.safe_dump(content, sort_keys=False)


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists: YAML has no others."""
    return {
        key: _plain(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in section.items()
    }
