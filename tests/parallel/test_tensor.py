"""Tensor parallelism by rule: any token count, few key heads, any vocabulary, and modules of other names."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

from parallel import grads
from parallel.apply import parallelize
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.fsdp import FsdpPolicy
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh
from parallel.tensor.plan import regions
from parallel.tensor.split import split
from parallel.tensor.vocabulary import VocabShard, split_cross_entropy

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 12, 4, 2, 3, 13


class Mixer(nn.Module):
    """Grouped heads under other names than longctx's, three inputs and one output."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=bias)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=bias)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=bias)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=bias)

    def forward(self, x, layout):
        q, k, v = (m(x).unflatten(-1, (-1, HEAD_DIM)) for m in (self.query, self.key, self.value))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(
            q[None].transpose(1, 2), k[None].transpose(1, 2), v[None].transpose(1, 2)
        )
        return self.out(mixed[0].transpose(0, 1).flatten(1))


class Squeeze(nn.Module):
    """Two matrices and a gelu, as GPT-2 has them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.widen = nn.Linear(WIDTH, 16, bias=bias)
        self.narrow = nn.Linear(16, WIDTH, bias=bias)

    def forward(self, x):
        return self.narrow(F.gelu(self.widen(x)))


class Stage(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.before, self.mixer = nn.LayerNorm(WIDTH), Mixer(bias)
        self.between, self.squeeze = nn.LayerNorm(WIDTH), Squeeze(bias)

    def forward(self, x, layout):
        x = x + self.mixer(self.before(x), layout)
        return x + self.squeeze(self.between(x))


class Toy(nn.Module):
    """An architecture that no part of the package has heard of."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.stages = nn.ModuleList([Stage(bias), Stage(bias)])
        self.final = nn.LayerNorm(WIDTH)
        self.scores = nn.Linear(WIDTH, VOCAB, bias=bias)

    def forward(self, ids, layout):
        x = self.words(ids)
        for stage in self.stages:
            x = stage(x, layout)
        return self.scores(self.final(x))


def make_toy(bias: bool) -> Toy:
    torch.manual_seed(0)
    return Toy(bias).double()


def make_batch(tokens: int):
    ids = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(tokens))
    layout = SequenceLayout.build(
        torch.tensor([0, tokens], dtype=torch.int32), ring=1, ulysses=1, ring_rank=0, ulysses_rank=0
    )
    return ids, ids.roll(-1), torch.arange(tokens) % 5 != 4, layout


def reference(tokens: int, bias: bool):
    model = make_toy(bias)
    ids, targets, trained, layout = make_batch(tokens)
    logits = model(ids, layout)
    loss = F.cross_entropy(logits[trained], targets[trained], reduction="sum")
    (loss / max(1, int(trained.sum()))).backward()
    return float(loss.detach()), logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def split_step(rank: int, size: int, tokens: int, bias: bool):
    """Loss, this rank's columns and every whole gradient of a step with tp = size."""
    mesh = build_mesh(ParallelConfig(tp=size), "cpu")
    model = make_toy(bias)
    policy = FsdpPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    parallelize(model, model.stages, mesh=mesh, policy=policy)
    ids, targets, trained, layout = make_batch(tokens)
    logits = model(ids, layout)
    shard = VocabShard.of(VOCAB, mesh)
    loss = split_cross_entropy(logits, targets, trained, shard)
    loss.backward()
    sums = torch.tensor([float(loss.detach()), int(trained.sum())], dtype=torch.float64)
    grads.normalize_(model.parameters(), mesh=mesh, sums=sums)
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return float(loss.detach()), logits.detach(), shard.first, found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size,tokens", [(2, 8), (2, 7), (4, 9), (4, 3), (4, 1), (2, 0)])
def test_a_new_architecture_is_split_by_rule(size, tokens, bias):
    """Uneven and fewer tokens than ranks; with tp 4 two ranks share a key head; 13 rows in 4 or 2 parts."""
    loss, logits, gradients = reference(tokens, bias)
    for found_loss, columns, first, found in run_ranks(split_step, size, tokens, bias):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert columns.shape == (tokens, min(-(-VOCAB // size), VOCAB - first))
        torch.testing.assert_close(
            columns, logits[:, first : first + columns.shape[1]], rtol=1e-10, atol=1e-12
        )
        assert found.keys() == gradients.keys()
        for name, want in gradients.items():
            scale = max(float(want.abs().max()), 1e-6)
            assert float((found[name] - want).abs().max()) <= 1e-10 * scale, name


def test_the_rules_name_columns_shared_heads_and_rows():
    found = {region.name: region for region in regions(Stage(False), 4)}
    assert (found["mixer"].columns, found["mixer"].shared, found["mixer"].row) == (
        ("query",),
        ("key", "value"),
        "out",
    )
    assert (found["squeeze"].columns, found["squeeze"].shared, found["squeeze"].row) == (
        ("widen",),
        (),
        "narrow",
    )
    assert {region.name: region.shared for region in regions(Stage(False), 2)} == {"mixer": (), "squeeze": ()}


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(WIDTH, WIDTH)


class Crooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 8), nn.Linear(8, 5)


@pytest.mark.parametrize(
    ("make", "tp", "message"),
    [
        (lambda: nn.Sequential(Alone()), 2, "no rule splits 0.matrix.weight"),
        (lambda: nn.Sequential(Crooked()), 2, "does not read and write the same stream of 12 channels"),
        (lambda: Stage(False), 3, "must divide the 4 heads of mixer.query; choose one of"),
        (lambda: nn.Sequential(Squeeze(False)), 5, "must divide the 16 rows of 0.widen"),
    ],
)
def test_what_no_rule_covers_is_refused_by_name(make, tp, message):
    with pytest.raises(ConfigError, match=message):
        list(regions(make(), tp))


def small_vocabulary(rank: int, size: int) -> str:
    mesh = build_mesh(ParallelConfig(tp=size), "cpu")
    model = Toy(False)
    model.words = nn.Embedding(5, WIDTH)
    try:
        split(model, model.stages, mesh=mesh)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_without_rows_of_the_vocabulary_is_refused():
    assert all(
        "model.vocab_size=5 leaves a rank of parallel.tp=4" in m for m in run_ranks(small_vocabulary, 4)
    )
