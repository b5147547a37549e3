"""A run small enough for a test: a corpus of a few made-up files and a two-layer model."""

import random
from datetime import timedelta
from pathlib import Path

LAYOUTS = {
    "one": (1, {}),
    "ulysses2": (2, {"ulysses": 2}),
    "ring2": (2, {"ring": 2}),
    "ulysses2-ring2": (4, {"ulysses": 2, "ring": 2}),
    "shard2-ring2": (4, {"dp_shard": 2, "ring": 2}),
}
AXES = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")


def write_corpus(folder: Path, *, documents: int = 40, seed: int = 0) -> Path:
    """Text files with lengths from 10 to about 1500 characters."""
    chooser = random.Random(seed)
    words = ["long", "context", "runs", "exact", "fast", "ring", "token", "shard", "a", "of", "the"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        count = int(2 + 250 * chooser.random() ** 3)
        text = " ".join(chooser.choice(words) for _ in range(count))
        (folder / f"doc{number:03d}.txt").write_text(text)
    return folder


def overrides(base: Path, name: str = "run", *, layout: dict[str, int] | None = None) -> list[str]:
    """Overrides of the quickstart recipe for a tiny run below `base`, which holds the corpus `docs`."""
    degrees = {axis: 1 for axis in AXES} | (layout or {})
    values = {
        "run.dir": base / name,
        "run.device": "cpu",
        "data.path": base / "docs",
        "data.cache_dir": base / "cache",
        "data.seq_len": 512,
        "data.held_out": 0.1,
        "data.workers": 1,
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.ffn_size": 48,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "train.steps": 6,
        "train.global_batch_tokens": 2048,
        "train.microbatch_tokens": 1024,
        "train.lr": 3e-4,
        "train.warmup_steps": 2,
        "train.eval_every": 3,
        "train.eval_tokens": 1024,
        "train.dtype": "float32",
        "checkpoint.every": 0,
        "recovery.spares": 0,
    } | {f"parallel.{axis}": degree for axis, degree in degrees.items()}
    return [f"{key}={value}" for key, value in values.items()]


def make_config(base: Path, name: str = "run", *, size: int = 1, layout=None, extra: tuple[str, ...] = ()):
    """The resolved config of a tiny run on `size` CPU processes; `extra` overrides come last."""
    from longctx.config.check import resolve
    from longctx.config.load import load

    loaded = load(["recipes/quickstart.yaml"], [*overrides(base, name, layout=layout), *extra])
    return resolve(loaded.config, size, "cpu")


def make_world(base: Path, rank: int, size: int, *, epoch: int = 0, timeout_s: float = 40.0):
    """This process among `size` gloo ranks that meet in a file below `base`."""
    import torch
    import torch.distributed as dist

    from longctx.build import World

    store = dist.FileStore(str(base / "rendezvous"), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return World(
        rank=rank, size=size, device=torch.device("cpu"), store=store, epoch=epoch, timeout_s=timeout_s
    )
