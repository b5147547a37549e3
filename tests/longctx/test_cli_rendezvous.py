"""Ranks that torchrun starts again find each other, whatever an earlier attempt has left in its store."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from longctx.cli.rendezvous import fresh

SIZE = 4


def attempt(store, ranks):
    """Keys that each rank sees of all ranks, after each has written its own."""

    def one(rank):
        mine = fresh(store, rank, SIZE, timeout_s=10.0)
        mine.set(f"address/{rank}", f"{id(ranks)}")
        return [mine.get(f"address/{other}").decode() for other in range(SIZE)]

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, ranks))


def test_every_attempt_sees_its_own_keys_alone():
    store = HashStore()
    for _ in range(3):
        order = [2, 0, 3, 1]
        assert attempt(store, order) == [[f"{id(order)}"] * SIZE] * SIZE


def test_ranks_that_came_late_or_never_in_an_attempt_do_not_spoil_the_next():
    store = HashStore()
    store.set("hello/1", "the dead")
    store.set("roster", json.dumps({"name": "attempt-old", "numbers": {"0": "x", "1": "the dead"}}))
    store.set("attempt-old/address/1", "a port where nobody listens")
    order = [3, 1, 2, 0]
    assert attempt(store, order) == [[f"{id(order)}"] * SIZE] * SIZE


def test_who_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come within 0.2 s"):
        fresh(HashStore(), 0, 3, timeout_s=0.2)
    with pytest.raises(TimeoutError, match="rank 0 has not come"):
        fresh(HashStore(), 2, 3, timeout_s=0.2)
