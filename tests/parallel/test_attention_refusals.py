"""Bad calls: an error that names the argument and a choice, on every rank, before any communication."""

import pytest
import torch
from ranks import run_ranks

from parallel.attention import Mask, make_attention, traffic
from parallel.attention import registry as registry_module
from parallel.attention.backends import KERNELS, Needs, choose
from parallel.config import ParallelConfig
from parallel.errors import ConfigError, UnsupportedError
from parallel.layout import SequenceLayout
from parallel.mesh import build_mesh


def caught(call):
    with pytest.raises(ConfigError) as error:
        call()
    return type(error.value).__name__, str(error.value)


def bad_calls(rank, size):
    mesh = build_mesh(ParallelConfig(ulysses=size), "cpu")
    layout = SequenceLayout.build([0, 8], ring=1, ulysses=2, ring_rank=0, ulysses_rank=rank)
    attend = make_attention("ulysses", mesh)

    def x(tokens=4, heads=4, head_dim=8, dtype=torch.float32):
        return torch.zeros(tokens, heads, head_dim, dtype=dtype)

    calls = {
        "tokens": lambda: attend(x(5), x(), x(), layout=layout),
        "batch": lambda: attend(x()[None], x(), x(), layout=layout),
        "no dims": lambda: attend(x(head_dim=0), x(head_dim=0), x(head_dim=0), layout=layout),
        "dtype": lambda: attend(x(), x(), x(dtype=torch.float64), layout=layout),
        "whole numbers": lambda: attend(*(x(dtype=torch.int64),) * 3, layout=layout),
        "values": lambda: attend(x(), x(), x(head_dim=4), layout=layout),
        "head_dim": lambda: attend(x(), x(head_dim=4), x(head_dim=4), layout=layout),
        "kv heads": lambda: attend(x(), x(heads=3), x(heads=3), layout=layout),
        "few heads": lambda: attend(x(heads=1), x(heads=1), x(heads=1), layout=layout),
        "device": lambda: attend(*(x().to("meta"),) * 3, layout=layout),
        "rank": lambda: attend(x(), x(), x(), layout=layout.at(0, 1 - rank)),
        "strategy": lambda: make_attention("megaphone", mesh),
        "kernel": lambda: make_attention("ring", mesh, kernel="fastest"),
        "degree": lambda: make_attention("ring", mesh)(x(), x(), x(), layout=layout),
        "inner": lambda: make_attention("usp", mesh, inner_ring=2)(x(), x(), x(), layout=layout),
        "scale": lambda: attend(x(), x(), x(), layout=layout, softmax_scale=float("nan")),
        "kernel dtype": lambda: attend(*(x().to(torch.float8_e4m3fn),) * 3, layout=layout),
    }
    mesh.counter.reset()
    found = {name: caught(call) for name, call in calls.items()}
    return found, dict(mesh.counter.calls)


def test_bad_calls_are_refused_on_every_rank_before_anything_is_sent():
    for found, calls in run_ranks(bad_calls, 2):
        assert calls == {}
        words = {
            "tokens": "q has 5 tokens, but layout.token_index has 4",
            "batch": "q has shape (1, 4, 4, 8); give [tokens, heads, head_dim]",
            "no dims": "q has shape (4, 4, 0); give [tokens, heads, head_dim]",
            "dtype": "v.dtype=torch.float64 differs from q.dtype=torch.float32",
            "whole numbers": "q.dtype=torch.int64 is not a floating dtype",
            "values": "v has shape (4, 4, 4), k has (4, 4, 8)",
            "head_dim": "k has head_dim 4, q has 8",
            "kv heads": "num_kv_heads=3 must divide num_heads=4; choose one of [1, 2, 4]",
            "few heads": "parallel.ulysses=2 exceeds num_heads=1; choose at most 1, or add parallel.ring",
            "device": "q is on meta, but the mesh was built for 'cpu'",
            "rank": "build the layout with ulysses_rank=mesh.sequence(ring, ulysses).ulysses_rank",
            "strategy": "attention.strategy='megaphone' is unknown; choose one of ['local', 'ulysses',",
            "kernel": "attention.kernel='fastest' is unknown; choose one of ['auto',",
            "degree": "attention.strategy='ring' does not serve layout.ulysses=2; set parallel.ulysses=1",
            "inner": "inner_ring=2 must divide layout.ring=1; choose one of [1]",
            "scale": "softmax_scale=nan is not finite; leave it out",
            "kernel dtype": "no attention kernel for full tiles on cpu, torch.float8_e4m3fn, head_dim=8",
        }
        assert set(words) == set(found)
        for name, text in words.items():
            assert text in found[name][1], (name, found[name])
        assert found["degree"][0] == "UnsupportedError"


def test_a_strategy_without_a_mask_is_refused_by_both_names(monkeypatch):
    partial = registry_module.Strategy(
        plan=None, route=None, ring=True, ulysses=True, masks=frozenset({"window"})
    )
    table = {**registry_module.STRATEGIES, "token_ring": partial}
    monkeypatch.setattr(registry_module, "STRATEGIES", table)
    layout = SequenceLayout.build([0, 8], ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    registry_module.check_strategy("token_ring", layout, Mask(window=3))
    with pytest.raises(UnsupportedError) as error:
        registry_module.check_strategy("token_ring", layout, Mask(anchor=True))
    assert "'token_ring' does not compute mask anchor=True; choose one of ['local'" in str(error.value)


def test_traffic_refuses_what_attend_refuses():
    layout = SequenceLayout.build([0, 8], ring=1, ulysses=2, ring_rank=0, ulysses_rank=0)
    shared = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "itemsize": 2}
    with pytest.raises(UnsupportedError, match=r"does not serve layout.ulysses=2"):
        traffic(layout, strategy="ring", **shared)
    with pytest.raises(ConfigError, match=r"exceeds num_heads=1"):
        traffic(layout, strategy="usp", **(shared | {"num_heads": 1, "num_kv_heads": 1}))


def test_the_choice_of_a_kernel_says_why():
    kernel, reason = choose("auto", Needs(form="band", device="cpu", dtype=torch.float32, head_dim=64))
    assert kernel.name == "cpu_flash"
    assert reason.startswith("cpu_flash: the first that can; not flash_attn_3 (runs on cuda); ")
    kernel, reason = choose("torch", Needs(form="full", device="cpu", dtype=torch.float64, head_dim=3))
    assert (kernel.name, reason) == ("torch", "torch: asked for")
    with pytest.raises(
        ConfigError, match=r"not cpu_flash \(runs on cpu\); choose one of \['auto', .*'torch'\]"
    ):
        choose("cpu_flash", Needs(form="full", device="cuda", dtype=torch.float32, head_dim=64))
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
