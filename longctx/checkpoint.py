"""Checkpoints: complete or absent, verified before they are trusted, and free of pickle.

A checkpoint is a folder `step-00000100` of safetensors shards (torch.distributed.checkpoint's
planners, so any layout can load it), `state.json` with what is not a tensor, and
`manifest.json`, written last: files, sizes, xxh3 checksums and the elements saved of each tensor.
torch's loader ignores a missing shard and leaves initial values; the manifest makes that an error.
The folder is written under another name and renamed when all ranks' files are on disk.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from parallel import comm

from .build import Run
from .errors import CheckpointError
from .files import hash_file, publish, sync_file, write_text

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_PREFIX = "step-"

# What one rank wrote: file entries, saved elements of each tensor, random state.
_Written = tuple[dict[str, Any], dict[str, int], dict[str, str]]


def save(run: Run) -> Path:
    """Write a checkpoint of `run` at its current step; all ranks call it together.

    Returns:
        The folder `run.dir/ckpt/step-N`.

    Raises:
        CheckpointError: a rank could not write (on every rank). Earlier checkpoints are untouched
            and nothing half-written is left behind.
    """
    folder = checkpoints_folder(run)
    target = folder / f"{_PREFIX}{run.progress.step:08d}"
    if (target / MANIFEST).exists():
        return target
    partial = folder / f".{target.name}.partial"
    try:
        with _together(run, f"preparing {partial}"):
            _prepare(run, partial)
        with _together(run, f"writing tensors to {partial}"):
            save_tensors(_tensors(run), storage_writer=_writer(partial))
        with _together(run, f"syncing {partial}"):
            mine = _seal(run, partial)
        written = comm.gather_json(mine, group=run.mesh.group("world"))
        with _together(run, f"writing the manifest of {partial}"):
            if run.world.rank == 0:
                _commit(run, partial, target, written)
    except CheckpointError as error:
        if run.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = latest_good(folder)
        raise CheckpointError(f"{error}; last good checkpoint: {kept or 'none'}") from error
    if run.world.rank == 0:
        _prune(folder, run.config.checkpoint.keep)
    return target


def checkpoints_folder(run: Run) -> Path:
    """Where the run's checkpoints lie."""
    return Path(run.config.run.dir) / "ckpt"


def latest_good(folder: Path | str) -> Path | None:
    """The newest checkpoint below `folder` whose files all match its manifest, or None.

    Damaged ones are passed over and named in a warning line.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            print(f"warning: {error}; trying the checkpoint before it", flush=True)
    return None


def list_checkpoints(folder: Path | str) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = Path(folder).glob(f"{_PREFIX}*/{MANIFEST}")
    return sorted(path.parent for path in found)


def verify(path: Path | str) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    path = Path(path)
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if xxhash.xxh3_64_hexdigest(_canonical(body)) != manifest.get("checksum"):
        raise CheckpointError(f"{path / MANIFEST}: its own checksum does not match, the file is altered")
    for name, entry in manifest["files"].items():
        _verify_file(path / name, entry)
    return manifest


def load(path: Path | str, run: Run) -> None:
    """Load parameters, optimizer moments, step and RNG into `run`, whatever layout saved them.

    Args:
        path: a folder that `save` wrote.
        run: built from a config of the same model, in any layout.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint is of another model.
    """
    path = Path(path)
    with _together(run, f"checking {path}"):
        manifest = verify(path) if run.world.rank == 0 else _read_json(path / MANIFEST)
    tensors = _tensors(run)
    _check_same_model(path, manifest, tensors)
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    state = _read_json(path / STATE)
    run.progress.step, run.progress.tokens = state["step"], state["tokens"]
    if run.mixture is not None:
        run.mixture.restore(state.get("mixture", {}))
    for slots in run.optimizer.state.values():
        slots["step"].fill_(state["optimizer_step"])
    if len(state["rng"]) == run.world.size:
        _set_rng(state["rng"][run.world.rank])


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """Parameters and AdamW moments by global name; missing moments are created as zeros."""
    tensors: dict[str, torch.Tensor] = {}
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        if id(parameter) not in optimized:
            raise CheckpointError(f"{name} is not what the optimizer updates: the model is still gathered")
        slots = run.optimizer.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            slots["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            slots["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"optim.{name}.exp_avg"] = slots["exp_avg"]
        tensors[f"optim.{name}.exp_avg_sq"] = slots["exp_avg_sq"]
    return tensors


def _writer(partial: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(str(partial), save_distributed=True)


def _prepare(run: Run, partial: Path) -> None:
    if run.world.rank != 0:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    need = sum(t.numel() * t.element_size() for t in _tensors(run).values())
    free = shutil.disk_usage(partial).free
    if free < need:
        gib = 2**30
        raise OSError(
            f"{partial.parent} has {free / gib:.2f} GiB free, a checkpoint needs {need / gib:.2f} GiB; "
            "free some space, lower checkpoint.keep or set run.dir to another disk"
        )


def _seal(run: Run, partial: Path) -> _Written:
    """Sync, hash and measure this rank's share of the files."""
    names = sorted(path.name for path in partial.glob("*.safetensors"))
    mine = names[run.world.rank :: run.world.size]
    files = {name: _sync_and_hash(partial / name) for name in mine}
    return files, _saved_elements(partial, mine), _get_rng()


def _commit(run: Run, partial: Path, target: Path, written: list[_Written]) -> None:
    """State and manifest, then the name under which the folder counts as a checkpoint."""
    files = {name: entry for entries, _, _ in written for name, entry in entries.items()}
    state = {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "optimizer_step": run.progress.step,
        "mixture": run.mixture.state() if run.mixture else {},
        "rng": [rng for _, _, rng in written],
    }
    write_text(partial / STATE, json.dumps(state, indent=1))
    files[STATE] = _sync_and_hash(partial / STATE)
    coverage = _coverage(run, [saved for _, saved, _ in written])
    body = {"format": FORMAT, "step": run.progress.step, "files": files, "tensors": coverage}
    signed = body | {"checksum": xxhash.xxh3_64_hexdigest(_canonical(body))}
    write_text(partial / MANIFEST, json.dumps(signed, indent=1))
    shutil.rmtree(target, ignore_errors=True)  # a folder without manifest: never a good checkpoint
    publish(partial, target)


def _coverage(run: Run, saved: list[dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every tensor, once its saved pieces add up to the whole."""
    coverage = {}
    for name, tensor in _tensors(run).items():
        elements = sum(part.get(name, 0) for part in saved)
        if elements != tensor.numel():
            raise CheckpointError(f"{name}: {elements} of {tensor.numel()} elements were written")
        coverage[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    return coverage


def _saved_elements(folder: Path, names: list[str]) -> dict[str, int]:
    elements: dict[str, int] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as shard:
            for key in shard.keys():
                shape = shard.get_slice(key).get_shape()
                elements[key] = elements.get(key, 0) + int(torch.Size(shape).numel())
    return elements


def _check_same_model(path: Path, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
    found = {name: entry["shape"] for name, entry in manifest["tensors"].items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} is of another model: {name} has shape {found.get(name, 'absent')} there, "
                f"{expected.get(name, 'absent')} in this config; use the config.resolved.yaml beside it"
            )


def _verify_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {entry['bytes']} were written")
    if hash_file(path) != entry["xxh3"]:
        raise CheckpointError(f"{path} is altered: its checksum differs from the manifest's")


def _sync_and_hash(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}


def _prune(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep] if keep > 0 else []:
        (old / MANIFEST).unlink()  # first, so that a kill in the middle leaves no checkpoint that looks whole
        shutil.rmtree(old)


@contextmanager
def _together(run: Run, doing: str) -> Iterator[None]:
    """Leave only when all ranks have finished; one rank's failure is every rank's error."""
    failure = ""
    try:
        yield
    except CheckpointException as error:  # torch's, of all ranks at once, and not an Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        failure = f"rank {rank}, {doing}: {cause}"
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        failure = f"rank {run.world.rank}, {doing}: {error}"
    failures = [f for f in comm.gather_json(failure, group=run.mesh.group("world")) if f]
    if failures:
        raise CheckpointError(failures[0])


def _get_rng() -> dict[str, str]:
    rng = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return rng


def _set_rng(rng: dict[str, str]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(rng["cpu"]), dtype=torch.uint8))
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(rng["cuda"]), dtype=torch.uint8))


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content
