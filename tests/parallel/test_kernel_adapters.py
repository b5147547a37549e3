"""Every GPU kernel's adapter against its library's recorded signature, on any machine."""

import sys

import flash_stubs
import pytest
import sequence_cases
import torch
from kernel_cases import errors

from parallel.attention import backends
from parallel.attention.backends import Needs, refusal, survey
from parallel.attention.kernel_fa2 import FLASH_ATTN_2
from parallel.attention.kernel_fa3 import FLASH_ATTN_3
from parallel.attention.kernel_fa4 import FLASH_ATTN_4
from parallel.attention.kernel_torch import TORCH
from parallel.attention.kernel_torch_gpu import CUDNN, TORCH_FLASH
from parallel.attention.mask import Mask
from parallel.attention.tiles import Tile, batches
from parallel.attention.varlen import launch_of, launches

STUBS = [
    (FLASH_ATTN_2, flash_stubs.flash_attn_2),
    (FLASH_ATTN_3, flash_stubs.flash_attn_3_tuple_window),
    (FLASH_ATTN_3, flash_stubs.flash_attn_3_operator),
    (FLASH_ATTN_4, flash_stubs.flash_attn_4),
]


def named(stubs):
    return [pytest.param(*stub, id=stub[1].__name__) for stub in stubs]


@pytest.mark.parametrize(("kernel", "stub"), named(STUBS))
@pytest.mark.parametrize("fields", sequence_cases.MASKS, ids=str)
def test_a_library_gets_what_its_signature_asks_for(kernel, stub, fields, monkeypatch):
    module = stub()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert max(errors(kernel, Mask(**fields))) < 1e-10


class AtenOperator:
    """A stand-in for an operator of the installed torch, called through its real schema."""

    def __init__(self, name, body):
        self._schema = getattr(torch.ops.aten, name).default._schema
        self._body = body

    def __call__(self, *args, **kwargs):
        wanted = [argument.name for argument in self._schema.arguments]
        given = dict(zip([a.name for a in self._schema.arguments if not a.kwarg_only], args, strict=False))
        assert not set(kwargs) - set(wanted) and not set(kwargs) & set(given)
        given |= kwargs
        for argument in self._schema.arguments:
            assert argument.name in given or argument.has_default_value(), f"{argument.name} is missing"
        return self._body(given)


def aten_flash_forward(a):
    assert a["dropout_p"] == 0.0 and a["return_debug_mask"] is False
    cu, most = (a["cum_seq_q"], a["cum_seq_k"]), (a["max_q"], a["max_k"])
    band = (a["is_causal"], a["window_size_left"], a["window_size_right"])
    found = flash_stubs.varlen_forward(a["query"], a["key"], a["value"], cu, most, a["scale"], band)
    return *found, torch.empty(2), torch.empty(0), torch.empty(0)


def aten_flash_backward(a):
    cu, most = (a["cum_seq_q"], a["cum_seq_k"]), (a["max_q"], a["max_k"])
    band = (a["is_causal"], a["window_size_left"], a["window_size_right"])
    names = ("grad_out", "query", "key", "value", "out", "logsumexp")
    return flash_stubs.varlen_backward([a[name] for name in names], cu, most, a["scale"], band)


@pytest.mark.parametrize("fields", sequence_cases.MASKS, ids=str)
def test_torch_flash_gets_what_the_installed_schema_asks_for(fields, monkeypatch):
    for name, body in (
        ("_flash_attention_forward", aten_flash_forward),
        ("_flash_attention_backward", aten_flash_backward),
    ):
        monkeypatch.setattr(torch.ops.aten, name, AtenOperator(name, body))
    assert max(errors(TORCH_FLASH, Mask(**fields))) < 1e-10


def _square(a):
    rows, columns = a["query"].shape[2], a["key"].shape[2]
    assert a["query"].shape[1] == a["key"].shape[1] and (rows == columns or not a["is_causal"])
    seen = torch.ones(rows, columns, dtype=torch.bool)
    return seen.tril() if a["is_causal"] else seen


def cudnn_forward(trailing):
    def body(a):
        assert a["compute_log_sumexp"] is True and a["attn_bias"] is None
        q, k, v = (a[name][0].transpose(0, 1) for name in ("query", "key", "value"))
        out, lse = flash_stubs.dense_forward(q, k, v, _square(a), a["scale"])
        return out.transpose(0, 1)[None], lse.reshape(1, *lse.shape, *trailing), *(None,) * 7

    return body


def cudnn_backward(trailing):
    def body(a):
        names = ("grad_out", "query", "key", "value", "out")
        tensors = [a[name][0].transpose(0, 1) for name in names]
        assert a["logsumexp"].shape == (1, *a["query"].shape[1:3], *trailing)
        assert (a["max_q"], a["max_k"]) == (a["query"].shape[2], a["key"].shape[2])
        lse = a["logsumexp"].reshape(a["query"].shape[1:3])
        grads = flash_stubs.dense_backward(*tensors, lse, _square(a), a["scale"])
        return tuple(grad.transpose(0, 1)[None] for grad in grads)

    return body


@pytest.mark.parametrize("trailing", [(), (1,)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"causal": False}, {"anchor": True}, {"group_shift": 6}], ids=str)
def test_cudnn_gets_what_the_installed_schema_asks_for(fields, trailing, monkeypatch):
    for name, body in (
        ("_scaled_dot_product_cudnn_attention", cudnn_forward(trailing)),
        ("_scaled_dot_product_cudnn_attention_backward", cudnn_backward(trailing)),
    ):
        monkeypatch.setattr(torch.ops.aten, name, AtenOperator(name, body))
    assert max(errors(CUDNN, Mask(**fields), heads=(4, 4))) < 1e-10


def test_another_layout_of_lse_is_an_error_not_a_wrong_result(monkeypatch):
    module = flash_stubs.flash_attn_2()
    forward = module._wrapped_flash_attn_varlen_forward

    def padded(*args, **kwargs):
        out, lse, *rest = forward(*args, **kwargs)
        return out, lse[None], *rest

    module._wrapped_flash_attn_varlen_forward = padded
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(RuntimeError, match=r"returned lse \(1, 4, 51\)"):
        errors(FLASH_ATTN_2, Mask())


def test_tiles_of_one_band_and_several_shapes_are_several_launches():
    """Row i of n sees column j of m if i - j is in [-3, 3]: from the corner, 3 + m - n to the left."""
    (batch,) = batches([Tile(0, 8, 0, 8, -3, 3), Tile(8, 4, 8, 6, -3, 3), Tile(12, 5, 14, 5, -3, 3)], None)
    found = [(part.tiles, launch_of(part, 1.0, torch.device("cpu"))) for part in launches(batch)]
    assert [[tile.q for tile in tiles] for tiles, _ in found] == [[0, 12], [8]]
    assert [(launch.left, launch.right, launch.causal) for _, launch in found] == [
        (3, 3, False),
        (5, 1, False),
    ]


NEEDS = {"form": "causal", "device": "cuda", "dtype": torch.bfloat16, "head_dim": 64}


def test_the_survey_names_every_kernel_and_why_not():
    found = {c.kernel.name: (c.usable, c.reason) for c in survey(Needs(**NEEDS | {"device": "cpu"}))}
    assert list(found) == [kernel.name for kernel in backends.KERNELS]
    assert found["flash_attn_3"] == (False, "runs on cuda")
    assert found["cpu_flash"] == (True, "the first that can")
    assert found["torch"] == (True, "can, after cpu_flash")


@pytest.mark.parametrize(
    ("kernel", "changed", "reason"),
    [
        (FLASH_ATTN_2, {"dtype": torch.float32}, "takes bfloat16, float16"),
        (FLASH_ATTN_2, {"head_dim": 264}, "takes head dims up to 256, multiples of 8"),
        (FLASH_ATTN_3, {"head_dim": 36}, "takes head dims up to 256, multiples of 8"),
        (FLASH_ATTN_4, {"head_dim": 192}, "takes head dims up to 128, multiples of 8"),
        (CUDNN, {"form": "band"}, "computes causal, full tiles, not band"),
        (CUDNN, {"grouped": True}, "takes as many key heads as query heads"),
        (TORCH_FLASH, {"device": "cpu"}, "runs on cuda"),
    ],
)
def test_a_kernel_is_refused_with_the_reason(kernel, changed, reason):
    assert refusal(kernel, Needs(**NEEDS | changed)) == reason


def device(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_automatic_choice_on_a_gpu_follows_what_is_installed(monkeypatch):
    """A Hopper machine with nothing, then flash-attn 2, then FlashAttention 3 installed; an older one."""
    device(monkeypatch, (9, 0))
    needs = Needs(**NEEDS)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    assert backends.choose("auto", needs)[0] is TORCH_FLASH
    assert backends.choose("auto", Needs(**NEEDS | {"dtype": torch.float64}))[0] is TORCH
    for kernel, stub in STUBS[:2]:
        module = stub()
        if "." in module.__name__:
            monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        assert backends.choose("auto", needs)[0] is kernel
    device(monkeypatch, (7, 5))
    chosen, reason = backends.choose("auto", needs)
    assert chosen is TORCH
    assert "not flash_attn_3 (needs compute capability 9.x, not 7.5)" in reason
    assert "not torch_flash (needs compute capability 8.x or more, not 7.5)" in reason


def test_a_library_that_does_not_import_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    device(monkeypatch, (9, 0))
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    found = refusal(FLASH_ATTN_3, Needs(**NEEDS))
    assert found == "flash_attn_interface does not import (undefined symbol: _ZN3c10)"
