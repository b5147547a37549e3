"""Tables are exact at any position; the rotation equals Hugging Face's and undoes itself."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longctx.rope import RopeConfig, rope_parameters
from longctx.rope.apply import rotate
from longctx.rope.tables import Frequencies

HEAD_DIM = 32


def frequencies(**keys):
    return Frequencies.stack([rope_parameters(RopeConfig(head_dim=HEAD_DIM, **keys))])


def heads(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HEAD_DIM, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rotation_equals_huggingface(dtype, tolerance):
    position_ids = torch.tensor([0, 1, 5, 900, 2, 0])
    q, k = heads(6, 4, dtype=dtype), heads(6, 2, dtype=dtype, seed=1)
    angles = position_ids[:, None].double() * frequencies().inv_freq
    cos, sin = (torch.cat((f(angles),) * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    theirs = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    table = frequencies().table(position_ids, None, dtype=dtype)
    for x, expected in zip((q, k), theirs, strict=True):
        turned = rotate(x, table)
        assert turned.dtype == dtype and turned.is_contiguous()
        assert (turned - expected[0]).abs().max() <= tolerance * expected.abs().max()


def test_gradient_is_the_rotation_backwards():
    table = frequencies().table(torch.tensor([3, 0, 700]), None, dtype=torch.float64)
    x = heads(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))
    (back,) = torch.autograd.grad(rotate(x, table), x, rotate(x.detach(), table))
    torch.testing.assert_close(back, x.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shift", [2**17, 2**20, 2**22])
def test_logits_depend_on_the_distance_alone(shift, dtype, bound):
    q, k = heads(64, 1, dtype=dtype), heads(64, 1, dtype=dtype, seed=1)

    def logits(start):
        turned = [rotate(x, frequencies().table(torch.full((64,), p), None, dtype=dtype)) for x, p in
                  ((q, start + 100), (k, start))]  # fmt: skip
        return (turned[0] * turned[1]).sum(-1)

    assert (logits(shift) - logits(0)).abs().max() <= bound


def test_bfloat16_input_turns_in_float32():
    position_ids = torch.arange(100_000, 100_064)
    x = heads(64, 2, dtype=torch.bfloat16)
    table = frequencies().table(position_ids, None, dtype=torch.bfloat16)
    assert table.cos.dtype == torch.float32
    turned = rotate(x, table)
    exact = rotate(x.double(), frequencies().table(position_ids, None, dtype=torch.float64))
    assert turned.dtype == torch.bfloat16
    assert (turned.double() - exact).abs().max() <= exact.abs().max() * 2**-8  # one rounding of the result


def test_rope_id_selects_the_frequencies_of_each_token():
    parameters = [
        rope_parameters(RopeConfig(head_dim=HEAD_DIM)),
        (frequencies(type="linear", factor=4.0).inv_freq[0], 1.5),
    ]
    both, position_ids = Frequencies.stack(parameters), torch.arange(6)
    rope_id = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = both.table(position_ids, rope_id, dtype=torch.float64)
    for row, alone in enumerate(parameters):
        expected = Frequencies.stack([alone]).table(position_ids, None, dtype=torch.float64)
        assert torch.equal(mixed.cos[rope_id == row], expected.cos[rope_id == row])
        assert torch.equal(mixed.sin[rope_id == row], expected.sin[rope_id == row])


def test_one_table_ignores_rope_id():
    position_ids = torch.arange(5)
    with_id = frequencies().table(position_ids, torch.zeros(5, dtype=torch.int64), dtype=torch.float32)
    without = frequencies().table(position_ids, None, dtype=torch.float32)
    assert torch.equal(with_id.cos, without.cos)


def test_no_tokens():
    table = frequencies().table(torch.zeros(0, dtype=torch.int64), None, dtype=torch.float32)
    assert rotate(torch.zeros(0, 4, HEAD_DIM), table).shape == (0, 4, HEAD_DIM)


def test_float_positions_are_refused():
    with pytest.raises(TypeError, match="int64"):
        frequencies().table(torch.zeros(3, dtype=torch.bfloat16), None, dtype=torch.float32)
