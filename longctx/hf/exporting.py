"""Weights of ours into a folder that transformers and vLLM load: renamed, streamed, cut into shards."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.tokenizers import BYTES, BytesTokenizer, tokenizer_path
from ..errors import ConfigError, DataError
from ..model.weights import to_hf
from ..tensors.dtypes import ITEM_BYTES, LONG_NAMES, SHORT_NAMES, torch_dtype
from ..tensors.fill import raw_bytes, read_tensor
from ..tensors.folder import write_whole
from ..tensors.header import Piece
from ..tensors.index import Stored, TensorIndex, by_rows, stream
from ..tensors.writer import Chunk, Item, write_file
from .architectures import hf_config
from .folder import COMPANIONS, CONFIG, INDEX, TOKENIZER
from .importing import check_space, fresh_folder
from .source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export has written."""

    path: Path
    """The folder."""
    num_bytes: int
    """Bytes of the weights."""
    num_files: int
    """Weight files."""
    dtype: str
    """Of the weights, as torch names it."""


def export_hf(source: Source, target: Path, *, dtype: str = "auto", max_shard_bytes: int) -> Exported:
    """Write a model folder of Hugging Face, one block in memory at a time.

    Args:
        source: opened model.
        target: folder that does not exist yet.
        dtype: of the weights as torch names it; `auto`: the imported model's, or as stored.
        max_shard_bytes: a weight file is no larger, unless a single tensor is.

    Raises:
        ConfigError: transformers has no such model, or the target exists.
        CheckpointError: a file of the source is damaged.
    """
    carried = _carried_config(source)
    to = _dtype(source, dtype, carried)
    config = hf_config(source.model, seq_len=source.seq_len, dtype=LONG_NAMES[to], carried=carried)
    total = sum(_size(stored, to) for stored in source.index.tensors.values())
    check_space(target, total)
    groups = _groups(source.index, to, max_shard_bytes)
    weight_map: dict[str, str] = {}
    with fresh_folder(target) as folder:
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            file = "model.safetensors" if len(groups) == 1 else file
            write_file(folder, file, [_item(source.index, name, to) for name in names])
            weight_map |= {to_hf(name): file for name in names}
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_whole(folder, INDEX, json.dumps(index, indent=2).encode())
        for name, content in _companions(source).items():
            write_whole(folder, name, content)
        write_whole(folder, CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return Exported(path=target, num_bytes=total, num_files=len(groups), dtype=LONG_NAMES[to])


def _carried_config(source: Source) -> dict[str, Any] | None:
    if source.companions is None:
        return None
    path = source.companions / CONFIG
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore the imported model's own") from error
    return found


def _dtype(source: Source, wanted: str, carried: dict[str, Any] | None) -> str:
    if wanted == "auto":
        stored = LONG_NAMES[next(iter(source.index.tensors.values())).dtype]
        given = (carried or {}).get("dtype") or (carried or {}).get("torch_dtype")
        wanted = str(given) if given in SHORT_NAMES else stored
    if wanted not in SHORT_NAMES:
        raise ConfigError(f"--dtype {wanted} is not supported; choose one of {', '.join(SHORT_NAMES)}")
    return SHORT_NAMES[wanted]


def _size(stored: Stored, dtype: str) -> int:
    return stored.num_bytes // ITEM_BYTES[stored.dtype] * ITEM_BYTES[dtype]


def _groups(index: TensorIndex, dtype: str, most: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, stored in index.tensors.items():
        size = _size(stored, dtype)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _item(index: TensorIndex, name: str, dtype: str) -> Item:
    shape = index.tensors[name].shape
    piece = Piece(
        name=to_hf(name), file="", start=0, num_bytes=0, dtype=dtype, offset=(0,) * len(shape), shape=shape
    )
    return Item(piece=piece, chunks=_chunks(index, name, dtype))


def _chunks(index: TensorIndex, name: str, dtype: str) -> Iterator[Chunk]:
    stored = index.tensors[name]
    blocks = stream(index, name) if by_rows(stored) else iter([raw_bytes(read_tensor(index, name))])
    if stored.dtype == dtype:
        yield from blocks
        return
    for block in blocks:
        yield raw_bytes(torch.frombuffer(block, dtype=torch_dtype(stored.dtype)).to(torch_dtype(dtype)))


def _companions(source: Source) -> dict[str, bytes]:
    """Tokenizer and generation settings: as imported, else made from the run's tokenizer."""
    if source.companions is not None:
        found = [source.companions / name for name in COMPANIONS if name != CONFIG]
        return {path.name: path.read_bytes() for path in found if path.is_file()}
    if source.tokenizer == BYTES:
        return bytes_tokenizer()
    try:
        path = tokenizer_path(source.tokenizer)
    except DataError as error:
        raise ConfigError(f"{source.where}: {error}") from error
    beside = [path.with_name(name) for name in COMPANIONS if name not in (CONFIG, TOKENIZER)]
    return {TOKENIZER: path.read_bytes()} | {p.name: p.read_bytes() for p in beside if p.is_file()}


def bytes_tokenizer() -> dict[str, bytes]:
    """`data.tokenizer=bytes` as files: id = byte, and the end of a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    assert tokenizer.token_to_id("</s>") == BytesTokenizer.eos_id
    beside = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    generation = {"eos_token_id": BytesTokenizer.eos_id}
    return {
        TOKENIZER: tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(beside, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    moved = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {byte: chr(byte) for byte in plain} | moved
