"""From torchrun's variables to the world of this attempt."""

import json
import os
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from ..build import World

POLL_S = 0.01


def torchrun_world(device: str) -> "World":
    """This process among the others, from the variables that torchrun sets."""
    import torch
    from torch.distributed.rendezvous import rendezvous

    from ..build import World

    store, rank, size = next(rendezvous("env://"))
    local_rank = int(os.environ["LOCAL_RANK"])
    own = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return World(rank=rank, size=size, device=own, store=fresh(store, rank, size))


def fresh(store: "Store", rank: int, size: int, *, timeout_s: float = 300.0) -> "Store":
    """A part of the store that no earlier attempt has written to; all ranks get the same.

    torchrun keeps one store across its restarts (torch 2.13, elastic/rendezvous/dynamic_rendezvous.py),
    with the addresses of the dead, and its restart count may differ between nodes. So rank 0 names the
    attempt, and everybody believes a rank 0 that has seen the number which this very process has drawn.

    Raises:
        TimeoutError: some ranks did not come; they are named.
    """
    from torch.distributed import PrefixStore

    own = secrets.token_hex(8)
    store.set(f"hello/{rank}", own)
    name = _gather(store, size, timeout_s) if rank == 0 else _follow(store, rank, own, timeout_s)
    return PrefixStore(name, store)


def _gather(store: "Store", size: int, timeout_s: float) -> str:
    """Rank 0: show everybody's number until everybody has seen its own."""
    name, until = f"attempt-{secrets.token_hex(8)}", time.monotonic() + timeout_s
    others = [rank for rank in range(size) if rank]
    while others:
        known = [rank for rank in range(size) if store.check([f"hello/{rank}"])]
        numbers = {rank: store.get(f"hello/{rank}").decode() for rank in known}
        store.set("roster", json.dumps({"name": name, "numbers": numbers}))
        time.sleep(POLL_S)
        others = [rank for rank in others if not store.check([f"{name}/seen/{rank}"])]
        if others and time.monotonic() > until:
            raise TimeoutError(f"ranks {others} did not come within {timeout_s:g} s; see their logs")
    return name


def _follow(store: "Store", rank: int, own: str, timeout_s: float) -> str:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        roster = json.loads(store.get("roster")) if store.check(["roster"]) else {"numbers": {}}
        if roster["numbers"].get(str(rank)) == own:
            store.set(f"{roster['name']}/seen/{rank}", "1")
            return str(roster["name"])
        time.sleep(POLL_S)
    raise TimeoutError(f"rank 0 has not come within {timeout_s:g} s; see its log")
