"""What makes a folder a checkpoint: `manifest.json`, its own checksum, and files that match it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from ..errors import CheckpointError
from ..tensors.folder import Folder, Where, folder_at, read_whole, write_whole
from ..tensors.header import Piece, read_header
from ..tensors.index import TensorIndex, check_piece, index_pieces

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A checkpoint whose manifest and headers have been read and agree."""

    manifest: dict[str, Any]
    """As in the file."""
    index: TensorIndex
    """Its tensors."""


def write_manifest(folder: Folder, body: Mapping[str, Any]) -> None:
    """Write the file that makes a folder a checkpoint; everything else must be on disk.

    Args:
        folder: the checkpoint.
        body: `kind` ("run" or "weights"), `step`, `model`, `tensors`, `files`.
    """
    whole = {"format": FORMAT, **body}
    signed = whole | {"checksum": xxhash.xxh3_64_hexdigest(_canonical(whole))}
    write_whole(folder, MANIFEST, json.dumps(signed).encode())


def write_small(folder: Folder, name: str, content: bytes) -> dict[str, Any]:
    """Write a file that is no tensor file; returns its entry in the manifest."""
    write_whole(folder, name, content)
    return {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest, once its version and its own checksum are right.

    Raises:
        CheckpointError: it is missing, altered, or of another version.
    """
    where = f"{folder.where}/{MANIFEST}"
    try:
        manifest: dict[str, Any] = json.loads(read_whole(folder, MANIFEST))
        found, checksum = manifest["format"], manifest.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is altered, it is not what was written ({error!r})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{where} has format {found}, this version reads {FORMAT}; load it with the version of longctx "
            "that wrote it, export it there with `longctx export`, and import the result"
        )
    if xxhash.xxh3_64_hexdigest(_canonical(manifest)) != checksum:
        raise CheckpointError(f"{where}: its own checksum does not match, the file is altered")
    return manifest


def open_checkpoint(where: Where) -> Opened:
    """Read the manifest and the headers of a checkpoint; the tensors themselves are checked as they are read.

    Raises:
        CheckpointError: names the file that is missing, truncated or altered.
    """
    folder = folder_at(where)
    manifest = read_manifest(folder)
    pieces: list[Piece] = []
    for name, entry in manifest["files"].items():
        if name.endswith(SUFFIX):
            pieces += _checked_pieces(folder, name, entry)
    shapes = {name: tuple(entry["shape"]) for name, entry in manifest["tensors"].items()}
    return Opened(manifest=manifest, index=index_pieces(folder, pieces, shapes))


def read_state(opened: Opened) -> dict[str, Any]:
    """What a run keeps beside its tensors.

    Raises:
        CheckpointError: the file is damaged, or these are weights without a run's state.
    """
    if STATE not in opened.manifest["files"]:
        raise CheckpointError(
            f"{opened.index.folder.where} holds weights alone; begin from it with checkpoint.init_from"
        )
    state: dict[str, Any] = json.loads(_checked_small(opened.index.folder, STATE, opened.manifest))
    return state


def verify(where: Where) -> dict[str, Any]:
    """Check every byte of a checkpoint.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    opened = open_checkpoint(where)
    check_small(opened)
    for stored in opened.index.tensors.values():
        for piece in stored.pieces:
            check_piece(opened.index.folder, piece)
    return opened.manifest


def check_small(opened: Opened, prefix: str = "") -> None:
    """Check every byte of the files that are no tensor files and whose names begin with `prefix`.

    Raises:
        CheckpointError: as `verify`.
    """
    for name in opened.manifest["files"]:
        if name.startswith(prefix) and not name.endswith(SUFFIX):
            _checked_small(opened.index.folder, name, opened.manifest)


def _checked_pieces(folder: Folder, name: str, entry: Mapping[str, Any]) -> list[Piece]:
    where = f"{folder.where}/{name}"
    size = folder.size(name)
    if size is not None and size != entry["bytes"]:
        raise CheckpointError(f"{where} has {size} bytes, {entry['bytes']} were written")
    header = read_header(folder, name)
    if xxhash.xxh3_64_hexdigest(header.raw) != entry["header_xxh3"]:
        raise CheckpointError(f"{where} is altered: the checksum of its header differs from the manifest's")
    return [replace(piece, sums=tuple(entry["sums"][piece.name])) for piece in header.pieces]


def _checked_small(folder: Folder, name: str, manifest: Mapping[str, Any]) -> bytes:
    content, entry = read_whole(folder, name), manifest["files"][name]
    if len(content) != entry["bytes"]:
        raise CheckpointError(
            f"{folder.where}/{name} has {len(content)} bytes, {entry['bytes']} were written"
        )
    if xxhash.xxh3_64_hexdigest(content) != entry["xxh3"]:
        raise CheckpointError(f"{folder.where}/{name} is altered: its checksum differs from the manifest's")
    return content


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
