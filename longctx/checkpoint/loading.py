"""From a checkpoint into a run, whatever layout wrote it."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from parallel import comm

from ..build import Run
from ..config.schema import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..tensors.fill import fill
from ..tensors.folder import Where, folder_at
from ..tensors.index import TensorIndex, index_from_json, index_to_json
from ..tensors.shard import shard_of
from .keeping import list_checkpoints, step_of, sweep, warn
from .manifest import Opened, open_checkpoint, read_state
from .shares import run_tensors, set_rng
from .together import together

_FREE = ("rope", "dropout", "init_std")
"""Keys of the model section that may change: a context is extended by `rope`."""


def resume(run: Run, where: Where) -> Where | None:
    """Load the newest good checkpoint below a folder; rank 0 decides and the others follow.

    A damaged checkpoint is named in a warning and the one before it is tried.

    Returns:
        The checkpoint, or None if there never was one.

    Raises:
        CheckpointError: there are checkpoints, and none of them is good.
        ConfigError: the checkpoint is of another model.
    """
    paths = _from_rank_0(run, _found(where) if run.world.rank == 0 else None)
    problems = []
    for path in paths:
        try:
            load(path, run)
            return str(path)
        except CheckpointError as error:
            problems.append(str(error))
            if run.world.rank == 0:
                warn(f"{error}; trying the checkpoint before it")
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {where} can be loaded, so the run cannot go on: "
            f"{problems[0]}. Repair or restore one of them; to begin again from step 0, take another run.dir"
        )
    return None


def _found(where: Where) -> list[str]:
    """What a resume tries, newest first; also folders that have lost their manifest."""
    folder = folder_at(where)
    sweep(folder)
    if not folder.renames:  # an upload that was cut short looks like that, and nothing is lost with it
        return [str(path) for path in reversed(list_checkpoints(where))]
    names = [name for name in folder.names() if step_of(name) is not None]
    return [str(folder.folder(name).where) for name in reversed(names)]


def load(path: Where, run: Run) -> None:
    """Load parameters, optimizer moments, step, data cursor and random state into `run`.

    Args:
        path: a checkpoint.
        run: built from a config of the same model, in any layout.

    Raises:
        CheckpointError: a file is damaged (on every rank).
        ConfigError: the checkpoint is of another model.

    Cost:
        Every rank reads the bytes of its own shards, rounded up to blocks with a checksum.
    """
    opened, state = _open(path, run)
    tensors = run_tensors(run)
    _check_same_model(path, opened, tensors, run)
    with together(run, f"loading {path}"):
        _fill_all(opened.index, tensors)
    run.progress.step, run.progress.tokens = state["step"], state["tokens"]
    run.progress.spikes = state.get("spikes", 0)
    run.progress.skip(state.get("skipped", []))
    if run.mixture is not None:
        run.mixture.restore(state.get("mixture", {}))
    if "watch" in state:
        run.watch.restore(state["watch"])
    for slots in run.optimizer.state.values():
        slots["step"].fill_(state["optimizer_step"])
    set_rng(state["rng"], run)


def load_weights(index: TensorIndex, run: Run) -> None:
    """Load parameters alone, as a run begins; the tensors' names are ours.

    Raises:
        CheckpointError: a tensor is damaged, missing or of another shape (on every rank).
    """
    with together(run, f"loading weights from {index.folder.where}"):
        _fill_all(index, dict(run.model.named_parameters()))


def _fill_all(index: TensorIndex, tensors: Mapping[str, Tensor]) -> None:
    """Reading and hashing leave the interpreter, so as many threads as torch has share the tensors."""
    shards = {name: shard_of(tensor) for name, tensor in tensors.items()}
    names = iter(list(shards))  # all threads take from it; a future each costs more than a small read

    def work() -> None:
        for name in names:
            fill(index, name, shards[name])

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(work) for _ in range(threads)]):
                done.result()
        finally:
            deque(names, maxlen=0)  # after an error or Ctrl-C the other threads find none left


def _open(path: Where, run: Run) -> tuple[Opened, dict[str, Any]]:
    """Rank 0 reads manifest, headers and state and tells the others."""
    mine: tuple[Opened, dict[str, Any]] | None = None
    told: Any = None
    with together(run, f"reading {path}"):
        if run.world.rank == 0:
            opened = open_checkpoint(path)
            mine = opened, read_state(opened)
            if run.world.size > 1:
                told = [opened.manifest, index_to_json(opened.index), mine[1]]
    told = _from_rank_0(run, told)
    if mine is not None:
        return mine
    manifest, tensors, state = told
    return Opened(manifest=manifest, index=index_from_json(folder_at(path), tensors)), state


def _from_rank_0(run: Run, value: Any) -> Any:
    return comm.broadcast_json(value, src=0, group=run.mesh.group("world"))


def check_model(theirs: Mapping[str, Any], ours: ModelConfig, where: Where) -> None:
    """Refuse weights of another model section: most keys change what is computed and no shape.

    Raises:
        ConfigError: names the key.
    """
    for key, value in asdict(ours).items():
        if key not in _FREE and theirs.get(key, value) != value:
            raise ConfigError(
                f"model.{key}={value}, but the weights in {where} have {theirs[key]}; set it to that, or "
                "compose what lies beside them: config.resolved.yaml of a run, model.yaml of an import"
            )


def _check_same_model(path: Where, opened: Opened, tensors: Mapping[str, Tensor], run: Run) -> None:
    check_model(opened.manifest["model"], run.config.model, path)
    mine = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected: dict[str, list[int]] = {}
    for shapes in comm.gather_json(mine, group=run.mesh.group("world")):
        expected |= shapes
    found = {name: entry["shape"] for name, entry in opened.manifest["tensors"].items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"{path} is of another model: {name} has shape {found.get(name, 'absent')} there, "
                f"{expected.get(name, 'absent')} in this config; use the config.resolved.yaml beside it"
            )
