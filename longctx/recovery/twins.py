"""Ranks that hold the same shards (HSDP) must hold the same values; a difference names its place."""

import socket
from collections import Counter

from parallel import comm

from ..build import Run
from ..checkpoint.shares import run_tensors
from ..errors import ReplicasDiffer
from .generations import tensor_digests


def compare_twins(run: Run, step: int) -> None:
    """Compare the digests of every parameter and moment along dp_replicate; all ranks call it.

    Raises:
        ReplicasDiffer: naming the rank, host and first tensor that is unlike the others'.
    """
    if run.mesh.size("dp_replicate") == 1:
        return
    mine = {"rank": run.world.rank, "host": socket.gethostname(), "digests": tensor_digests(run_tensors(run))}
    problem = first_difference(comm.gather_json(mine, group=run.mesh.group("dp_replicate")))
    problems = comm.gather_json(problem, group=run.mesh.group("world"))
    if any(problems):
        raise ReplicasDiffer(f"after step {step}: {next(each for each in problems if each)}")


def first_difference(replicas: list[dict[str, object]]) -> str | None:
    """The first tensor of which replicas have different digests, and who is in the minority, if one is."""
    digests: list[dict[str, int]] = [each["digests"] for each in replicas]  # type: ignore[misc]
    for name in digests[0]:
        values = Counter(each[name] for each in digests)
        if len(values) > 1:
            common, count = values.most_common(1)[0]
            if 2 * count <= len(replicas):
                who = ", ".join(f"rank {each['rank']} ({each['host']})" for each in replicas)
                return f"{name} differs between {who}, which hold the same shard; check their memory and GPUs"
            odd = next(i for i, each in enumerate(digests) if each[name] != common)
            others = [each["rank"] for i, each in enumerate(replicas) if i != odd]
            return (
                f"{name} on rank {replicas[odd]['rank']} ({replicas[odd]['host']}) differs from that of "
                f"ranks {others}, which hold the same shard; check that machine's memory and GPU"
            )
    return None
