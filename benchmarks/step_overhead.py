"""What our one-process training step costs over a minimal hand-written PyTorch loop.

Both train the same decoder (same shapes, same parameters, same packed batch, AdamW with clipping)
on one process; the hand-written one knows nothing of meshes, layouts, sharding or sums. Measured in
turns. Goal: median ratio <= 1.03.
"""

import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import harness
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from longctx.build import Run, World, build
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.config.schema import ModelConfig
from longctx.data.batch import PackedBatch
from longctx.train.step import train_step


class Layer(nn.Module):
    """A pre-norm block as one writes it for one document-packed row."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(c.hidden_size, c.norm_eps), nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.q = nn.Linear(c.hidden_size, wide, bias=False)
        self.k = nn.Linear(c.hidden_size, narrow, bias=False)
        self.v = nn.Linear(c.hidden_size, narrow, bias=False)
        self.o = nn.Linear(wide, c.hidden_size, bias=False)
        self.gate = nn.Linear(c.hidden_size, c.ffn_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.ffn_size, bias=False)
        self.down = nn.Linear(c.ffn_size, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, bounds):
        """[T, E] -> [T, E]."""
        h, c = self.norm1(x), self.c
        q = rotate(self.q(h).view(-1, c.num_heads, c.head_dim), cos, sin)
        k = rotate(self.k(h).view(-1, c.num_kv_heads, c.head_dim), cos, sin)
        v = self.v(h).view(-1, c.num_kv_heads, c.head_dim)
        x = x + self.o(documents(q, k, v, bounds))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Embedding, layers, norm, tied head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(int(c.vocab_size), c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, ids, positions, bounds):
        """[T] -> [T, V]."""
        half = torch.arange(0, self.c.head_dim, 2, dtype=torch.float64) / self.c.head_dim
        angles = positions.double()[:, None] * self.c.rope.theta**-half
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, bounds)
        return F.linear(self.norm(x), self.embedding.weight)


def rotate(x, cos, sin):
    """Half-split rotary embedding of [T, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def documents(q, k, v, bounds):
    """Causal attention within each document; [T, H, D] -> [T, H D]."""
    outs = []
    for a, b in itertools.pairwise(bounds):
        parts = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def make_run(folder: Path, args) -> Run:
    """Our run on one process."""
    overrides = [f"run.dir={folder}", "run.device=cpu", f"run.seed={args.seed}", "train.lr=3e-4"]
    if args.quick:
        overrides += ["data.seq_len=1k", "train.global_batch_tokens=1k", "model.num_layers=2"]
    config = resolve(load(["recipes/quickstart.yaml"], overrides).config, 1, "cpu")
    world = World(rank=0, size=1, device=torch.device("cpu"), store=dist.HashStore())
    return build(config, world)


def make_plain(run: Run):
    """The hand-written step on the same parameters; returns a function of a batch."""
    config = replace(run.config.model)
    model = Model(config)
    train = run.config.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )

    def step(batch: PackedBatch) -> None:
        bounds = batch.cu_seqlens.tolist()
        logits = model(batch.input_ids, batch.position_ids, bounds)
        targets = torch.where(batch.loss_mask, batch.targets, -100)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), args)
        plain = make_plain(run)
        batch = run.loader.step(0)[0]

        def ours() -> None:
            run.progress.step = 0  # the same batch every time
            train_step(run, run.config.train.lr)

        seconds = harness.in_turns(
            {"ours": ours, "plain": lambda: plain(batch)}, rounds=2 if args.quick else 15
        )
        run.close()
    ratio = harness.paired_ratio(seconds["ours"], seconds["plain"])
    figures = {
        "ours_ms": harness.Figure(1e3 * harness.median(seconds["ours"]), "ms", "one step, median"),
        "plain_ms": harness.Figure(1e3 * harness.median(seconds["plain"]), "ms", "hand-written loop, median"),
        "ratio": harness.Figure(ratio, "ratio", "median of ours / plain in the same round; goal <= 1.03"),
        "tokens": harness.Figure(batch.num_tokens, "count", f"in {len(batch.doc_ids)} documents"),
    }
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
