"""Checkpoints change layout: a run that moves through nine layouts keeps the losses of one process."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from ranks import run_ranks
from tiny import make_config, make_world, write_corpus

from longctx import checkpoint
from longctx.build import build
from longctx.errors import CheckpointError
from longctx.tensors.fill import fill, raw_bytes, read_tensor
from longctx.tensors.folder import LocalFolder
from longctx.tensors.header import Piece, read_header
from longctx.tensors.index import index_from_json, index_pieces, index_to_json
from longctx.tensors.shard import Shard
from longctx.tensors.writer import Item, write_file
from longctx.train.step import train_step

CHAIN = (
    {},
    {"dp_shard": 2},
    {"tp": 2},
    {"ulysses": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"pp": 2},
    {"ring": 2},
    {"pp": 2, "dp_shard": 2},
    {},
)


def size_of(layout: dict) -> int:
    return int(np.prod(list(layout.values()), dtype=int))


EXTRA = ("train.dtype=float64", "curriculum.kind=uniform", "data.min_len=64", "train.eval_every=0")


def one_step(base, rank: int, number: int, layout: dict) -> float:
    """Resume in `layout`, train a step, save; the step's loss."""
    world = base / f"rendezvous-{number}"
    world.mkdir(exist_ok=True)
    size = size_of(layout)
    extra = (*EXTRA, f"checkpoint.codec={'zstd' if number % 2 else 'none'}")
    config = make_config(base, "moved", size=size, layout=layout, extra=extra)
    run = build(config, make_world(world, rank, size))
    checkpoint.resume(run, checkpoint.checkpoints_folder(run))
    assert run.progress.step == number
    loss = train_step(run, 1e-3).loss
    checkpoint.save(run)
    run.close()
    return loss


def move(rank: int, size: int, base) -> list[float]:
    """Idle ranks wait for the layout that needs them."""
    return [one_step(base, rank, n, layout) for n, layout in enumerate(CHAIN) if rank < size_of(layout)]


def stay(rank: int, size: int, base) -> list[float]:
    run = build(make_config(base, "whole", extra=EXTRA), make_world(base, rank, size))
    losses = [train_step(run, 1e-3).loss for _ in CHAIN]
    run.close()
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_corpus(folder / "docs")
    return folder


@pytest.mark.timeout(120)
def test_losses_after_every_change_of_layout_equal_the_uninterrupted_run(base):
    (expected,) = run_ranks(stay, 1, base, init=False)
    losses = run_ranks(move, 4, base, init=False)
    assert losses[0] == pytest.approx(expected, rel=1e-10)
    assert len(set(expected)) == len(CHAIN)


def item(tensor: torch.Tensor, name: str, offset=None) -> Item:
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}[tensor.dtype]
    offset = tuple(offset or (0,) * tensor.ndim)
    shape = tuple(tensor.shape)
    piece = Piece(name=name, file="", start=0, num_bytes=0, dtype=dtype, offset=offset, shape=shape)
    return Item(piece=piece, chunks=[raw_bytes(tensor)])


def pieces_of(folder, *written):
    from dataclasses import replace

    return [
        replace(piece, sums=tuple(each.sums[piece.name]))
        for each in written
        for piece in read_header(folder, each.file).pieces
    ]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_box_of_a_tensor_is_read_from_any_pieces(tmp_path, coded, dtype):
    folder = LocalFolder(tmp_path)
    whole = torch.randn(61, 34, generator=torch.Generator().manual_seed(0)).to(dtype)
    cuts = (0, 20, 20, 61)  # an empty piece too
    files = [
        write_file(folder, f"{n}.safetensors", [item(whole[a:b], "w", (a, 0))], coded=coded)
        for n, (a, b) in enumerate(pairwise(cuts))
    ]
    index = index_pieces(folder, pieces_of(folder, *files), {"w": (61, 34)})
    index = index_from_json(folder, json.loads(json.dumps(index_to_json(index))))
    assert torch.equal(read_tensor(index, "w"), whole)
    for rows, columns in (
        (slice(5, 40), slice(0, 34)),
        (slice(19, 21), slice(3, 20)),
        (slice(61), slice(34)),
    ):
        local = torch.zeros_like(whole[rows, columns], dtype=torch.float64).t().contiguous().t()
        fill(index, "w", Shard(local=local, shape=(61, 34), offset=(rows.start or 0, columns.start or 0)))
        assert torch.equal(local, whole[rows, columns].double())


def test_chunks_of_any_size_become_blocks_with_checksums(tmp_path, monkeypatch):
    from longctx.tensors import folder as folder_module
    from longctx.tensors import index as index_module
    from longctx.tensors import writer

    for module, name in (
        (index_module, "BLOCK"),
        (writer, "BLOCK"),
        (writer, "STEP"),
        (folder_module, "STEP"),
    ):
        monkeypatch.setattr(module, f"{name}_BYTES", 256 if name == "BLOCK" else 100)
    folder, whole = LocalFolder(tmp_path), torch.arange(1000, dtype=torch.float32)
    raw = raw_bytes(whole)

    def chunks():  # each is valid until the next
        buffer = memoryview(bytearray(700))
        for start in range(0, len(raw), 700):
            part = buffer[: len(raw) - start]
            part[:] = raw[start : start + 700]
            yield part

    written = write_file(folder, "a.safetensors", [Item(piece=item(whole, "w").piece, chunks=chunks())])
    blocks = [raw[start : start + 256] for start in range(0, len(raw), 256)]
    assert written.sums == {"w": [xxhash.xxh3_64_hexdigest(block) for block in blocks]}
    assert torch.equal(read_tensor(index_pieces(folder, pieces_of(folder, written)), "w"), whole)


def test_a_partial_read_touches_and_checks_only_its_blocks(tmp_path, monkeypatch):
    from longctx.tensors import index as index_module
    from longctx.tensors import writer

    monkeypatch.setattr(index_module, "BLOCK_BYTES", 256)
    monkeypatch.setattr(writer, "BLOCK_BYTES", 256)
    folder = LocalFolder(tmp_path)
    whole = torch.arange(1000, dtype=torch.float32)
    index = index_pieces(folder, pieces_of(folder, write_file(folder, "a.safetensors", [item(whole, "w")])))
    piece = index.tensors["w"].pieces[0]
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[piece.start + 3999] ^= 1  # the last byte
    (tmp_path / "a.safetensors").write_bytes(content)
    local = torch.zeros(300)
    fill(index, "w", Shard(local=local, shape=(1000,), offset=(100,)))
    assert torch.equal(local, whole[100:400])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is altered.* of w"):
        read_tensor(index, "w")
