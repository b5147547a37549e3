"""What ranks that wait say about themselves, from real processes on real process groups to the report."""

import json
import os
import signal
import threading
import time

from ranks import run_ranks

from launch import hang


def stand(rank, size, folder):
    """Rank 1 never comes to the second collective; asked for it, rank 0 tells while it waits inside."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from longctx.cli import standing

    standing.answer(folder / "logs", rank)
    store = dist.FileStore(str(folder / "store"), size)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    told = [folder / hang.CALLS.format(rank=each) for each in range(size)]
    if rank == 0:
        dist.all_reduce(tensor)
    while not all(path.exists() for path in told):
        time.sleep(0.05)
    if rank == 1:
        dist.all_reduce(tensor)


def test_a_rank_that_waits_inside_a_collective_tells_it_and_who_is_behind(tmp_path):
    run_ranks(stand, 2, tmp_path, init=False, timeout=40)
    found = hang.calls(tmp_path, 2)
    assert [(call.number, call.ranks, call.done) for call in found[0]] == [(2, (0, 1), False)]
    assert [(call.number, call.done) for call in found[1]] == [(1, True)]
    (line,) = hang.unequal(found)
    assert "(ranks 0, 1) waits in collective 2, gloo:all_reduce of [[4]]" in line
    assert "rank 1 has got to 1" in line
    places = hang.read(tmp_path, 2)
    assert places[0].waiting and not places[1].waiting
    assert hang.report(places)[-1] == "rank 0 waits for rank 1"


def call(number, what="all_reduce of [[4]]", *, done=False):
    return hang.Call(group="3", ranks=(0, 1, 2), number=number, what=what, done=done)


def test_ranks_whose_calls_differ_are_named():
    odd = call(7, "all_gather of [[2]]")
    assert hang.unequal({0: [call(7)], 1: [odd], 2: [call(7)]}) == [
        "group 3 (ranks 0, 1, 2): collective 7 is all_reduce of [[4]], but rank 1 calls all_gather of [[2]]"
    ]
    assert hang.unequal({0: [call(7)], 1: [call(7)], 2: [call(7)]}) == []
    assert hang.unequal({0: [call(7, done=True)], 1: [call(6, done=True)]}) == []


def test_what_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "calls_0.json").write_text(json.dumps([{"group": "0"}]))
    (tmp_path / "logs" / "calls_1.json").write_text("[{")
    assert hang.calls(tmp_path, 3) == {}
