"""Train one attention layer on a sequence that is split over processes; plain PyTorch, no longctx.

torchrun --nproc-per-node 4 examples/sequence_parallel.py
"""

import torch
import torch.distributed as dist
from torch import nn

from parallel.attention import make_attention
from parallel.config import ParallelConfig
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh


def main() -> list[float]:
    """Five steps on two documents of 700 and 300 tokens; the loss does not depend on the split."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    size = dist.get_world_size()
    ulysses = 2 if size % 2 == 0 else 1  # heads inside pairs of ranks, a ring across them
    mesh = build_mesh(ParallelConfig(ring=size // ulysses, ulysses=ulysses), "cpu")
    attend = make_attention("usp", mesh)
    where = {"ring_rank": mesh.coordinate("ring"), "ulysses_rank": mesh.coordinate("ulysses")}
    layout = SequenceLayout.build([0, 700, 1000], ring=size // ulysses, ulysses=ulysses, **where)

    torch.manual_seed(0)  # the same weights and batch on every rank
    qkv, project = nn.Linear(64, 64 + 2 * 32), nn.Linear(64, 64)
    inputs, targets = torch.randn(2, 1000, 64)[:, layout.token_index]  # this rank's tokens
    parameters = [*qkv.parameters(), *project.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=10.0)
    losses = []
    for _ in range(5):
        q, k, v = qkv(inputs).unflatten(-1, (-1, 16)).split((4, 2, 2), dim=1)  # 4 query, 2 key heads
        loss = (project(attend(q, k, v, layout=layout).flatten(1)) - targets).square().sum() / targets[
            0
        ].numel()
        optimizer.zero_grad()
        (loss / 1000).backward()
        for x in [loss.detach(), *(p.grad for p in parameters)]:
            dist.all_reduce(x)  # sums over ranks; 1000 tokens in all
        optimizer.step()
        losses.append(loss.item() / 1000)
    return losses


if __name__ == "__main__":
    print("\n".join(f"step {step}  loss {loss:.6f}" for step, loss in enumerate(main())))
