"""What checkpoints cost: stall of a background save, throughput, memory of an import.

Throughput: the same tensors (a model with its AdamW moments, one process) written and read by
longctx with a checksum for every block, by torch.distributed.checkpoint, and by safetensors'
save_file/load_file followed by an fsync and a copy into the parameters, in turns, on a memory file
system where there is one, so that the software is measured and not the disk: a large state, and a
small one whose fixed work shows. Goals: >= 0.95 of the faster peer; stall <= 10% of a step; import
of a 1B-parameter model within 1.3 times its largest shard file.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from longctx import checkpoint
from longctx.build import Run, World, build
from longctx.checkpoint.shares import run_tensors
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.config.schema import ModelConfig
from longctx.files import sync_file
from longctx.hf.architectures import hf_config
from longctx.model.params import parameter_shapes
from longctx.model.weights import to_hf
from longctx.tensors.folder import LocalFolder
from longctx.tensors.header import Piece
from longctx.tensors.shard import shard_of
from longctx.tensors.writer import Item, write_file
from longctx.train.step import train_step

Figure = harness.Figure
MIB = 2**20
CHILD = """
import sys
from longctx.cli.main import main
code = main(["import", *sys.argv[1:]])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
sys.exit(code)
"""


def make_run(folder: Path, *, layers: int, hidden: int, tokens: int, seed: int) -> Run:
    """A run on this process."""
    overrides = [f"run.dir={folder}", "run.device=cpu", f"run.seed={seed}", "checkpoint.keep=1"]
    overrides += [f"data.seq_len={tokens}", f"train.global_batch_tokens={tokens}"]
    overrides += [f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.ffn_size={3 * hidden}"]
    overrides += ["model.num_heads=8", "model.num_kv_heads=4", f"model.head_dim={hidden // 8}"]
    config = resolve(load(["recipes/quickstart.yaml"], overrides).config, 1, "cpu")
    return build(config, World(rank=0, size=1, device=torch.device("cpu"), store=dist.HashStore()))


def stall(run: Run, *, rounds: int) -> dict[str, Figure]:
    """Seconds that a step loses to a background save, and to its writing behind the next step."""
    saver = checkpoint.Saver(run)
    rate = run.config.train.lr
    train_step(run, rate)
    saver.save(background=True)  # allocates the staging memory
    saver.wait()
    plain, stalls, behind = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        train_step(run, rate)
        plain.append(time.perf_counter() - started)
        started = time.perf_counter()
        saver.save(background=True)
        stalls.append(time.perf_counter() - started)
        started = time.perf_counter()
        train_step(run, rate)
        behind.append(time.perf_counter() - started)
        saver.wait()
    step = harness.median(plain)
    size = sum(t.numel() * t.element_size() for t in run_tensors(run).values())
    percent = 100 * harness.median(stalls) / step
    slower = 100 * (harness.paired_ratio(behind, plain) - 1)
    return {
        "stall_percent": Figure(percent, "%", "wait for a background save / a step; goal <= 10"),
        "stall_ms": Figure(1e3 * harness.median(stalls), "ms", f"copy of {size / MIB:,.0f} MiB of state"),
        "step_ms": Figure(1e3 * step, "ms", "a step without a save"),
        "step_behind_save_percent": Figure(slower, "%", "longer is a step while the save is written"),
    }


def throughput(run: Run, folder: Path, *, rounds: int, prefix: str = "") -> dict[str, Figure]:
    """MB/s of saving and loading, and ratios to the faster peer; `prefix` begins the figures' names."""
    tensors = {name: shard_of(t).local for name, t in run_tensors(run).items()}
    for tensor in tensors.values():
        tensor.normal_()  # moments that are still zero may have no memory
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    bare, torchs = folder / "bare.safetensors", folder / "dcp"
    ours = Path(run.config.run.dir) / "ckpt"

    saver = checkpoint.Saver(run)

    def save_ours() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        saver.save()

    def save_bare() -> None:
        save_file(tensors, bare)
        sync_file(bare)

    def save_torch() -> None:
        shutil.rmtree(torchs, ignore_errors=True)
        dcp.save(tensors, checkpoint_id=torchs)

    def load_bare() -> None:
        for name, tensor in load_file(bare).items():
            tensors[name].copy_(tensor)

    def load_ours() -> None:
        checkpoint.load(checkpoint.list_checkpoints(ours)[-1], run)

    saves: dict[str, Callable[[], None]] = {"ours": save_ours, "dcp": save_torch, "safetensors": save_bare}
    saved = harness.in_turns(saves, rounds=rounds)
    loads: dict[str, Callable[[], None]] = {
        "ours": load_ours,
        "dcp": lambda: dcp.load(tensors, checkpoint_id=torchs),
        "safetensors": load_bare,
    }
    with torch.no_grad():
        loaded = harness.in_turns(loads, rounds=rounds)
    figures = {}
    for verb, seconds in (("save", saved), ("load", loaded)):
        for name, each in seconds.items():
            note = f"{size / 1e6:,.0f} MB of state" if name == "ours" else ""
            figures[f"{prefix}{verb}_{name}"] = Figure(size / 1e6 / harness.median(each), "MB/s", note)
        peers = [[min(pair) for pair in zip(seconds["dcp"], seconds["safetensors"], strict=True)]]
        ratio = harness.paired_ratio(peers[0], seconds["ours"])
        note = "ours / the faster of both peers in the same round; goal >= 0.95"
        figures[f"{prefix}{verb}_ratio"] = Figure(ratio, "ratio", note)
    return figures


def repeated(block: bytes, size: int) -> Iterator[bytes]:
    """`size` bytes."""
    for start in range(0, size, len(block)):
        yield block[: size - start]


def make_hf_model(folder: Path, *, layers: int, hidden: int, shard_bytes: int) -> tuple[int, int]:
    """A random bfloat16 Llama in shards; its parameters and the largest file's bytes."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=4 * hidden,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 256,
        head_dim=64,
        vocab_size=32000,
        tied_embeddings=False,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model, seq_len=8192, dtype="bfloat16")))
    groups: list[list[Item]] = [[]]
    weight_map: dict[str, int] = {}
    filled = 0
    block = os.urandom(4 * MIB)
    for name, shape in parameter_shapes(model).items():
        size = 2 * math.prod(shape)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        filled += size
        theirs = to_hf(name)
        weight_map[theirs] = len(groups)
        offset = (0,) * len(shape)
        piece = Piece(name=theirs, file="", start=0, num_bytes=0, dtype="BF16", offset=offset, shape=shape)
        chunks = repeated(block, size)
        groups[-1].append(Item(piece=piece, chunks=chunks))
    files = {n: f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)}
    sizes = [write_file(LocalFolder(folder), files[n], group).num_bytes for n, group in enumerate(groups, 1)]
    index = {"metadata": {}, "weight_map": {name: files[number] for name, number in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(math.prod(shape) for shape in parameter_shapes(model).values()), max(sizes)


def importing(folder: Path, *, quick: bool) -> dict[str, Figure]:
    """Seconds and peak memory of `longctx import` in a process of its own."""
    shape = {"layers": 2, "hidden": 256} if quick else {"layers": 16, "hidden": 2048}
    parameters, largest = make_hf_model(folder / "hf", **shape, shard_bytes=(16 if quick else 640) * MIB)
    command = [sys.executable, "-c", CHILD, str(folder / "hf"), str(folder / "ours"), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=harness.ROOT)
    seconds = time.perf_counter() - started
    peak = int(done.stdout.splitlines()[-1])
    note = "peak memory / largest shard file, Python and torch included; goal <= 1.3"
    return {
        "import_parameters": Figure(parameters, "count", "bfloat16, sharded"),
        "import_s": Figure(seconds, "s", "start of the process included"),
        "import_peak_mib": Figure(peak / MIB, "MiB", f"largest shard {largest / MIB:,.0f} MiB"),
        "import_peak_ratio": Figure(peak / largest, "ratio", note if not quick else "too small to tell"),
    }


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="longctx-bench-", dir=memory) as name:
        folder = Path(name)
        figures = importing(folder, quick=args.quick)
        shutil.rmtree(folder / "hf")
        shutil.rmtree(folder / "ours")
        small = {"layers": 2, "hidden": 64} if args.quick else {"layers": 6, "hidden": 512}
        run = make_run(folder / "run", **small, tokens=512 if args.quick else 1024, seed=args.seed)
        figures |= stall(run, rounds=2 if args.quick else 4)
        figures |= throughput(run, folder, rounds=2 if args.quick else 5, prefix="small_")
        run.close()
        large = {"layers": 2, "hidden": 128} if args.quick else {"layers": 6, "hidden": 1024}
        run = make_run(folder / "large", **large, tokens=512, seed=args.seed)
        figures |= throughput(run, folder, rounds=2 if args.quick else 5)
        run.close()
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
