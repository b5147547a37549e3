"""Original and extended frequencies in one packed step; layers without positions; documents' lengths."""

from dataclasses import replace

import dense
import pytest
import torch

from longctx.config.schema import ModelConfig, RopeConfig
from longctx.model.decoder import Decoder
from longctx.model.init import init_parameters_
from longctx.rope.apply import rotate
from longctx.rope.frequencies import rope_parameters
from longctx.rope.tables import Frequencies, token_lengths
from parallel.layout import SequenceLayout

YARN = RopeConfig(type="yarn", theta=1e3, factor=4.0, original_len=16)
PLAIN = RopeConfig(theta=1e3)
LENGTHS = (10, 40, 16, 17)


def model_of(rope, attend=dense.attend):
    config = ModelConfig(
        num_layers=3, hidden_size=32, ffn_size=48, head_dim=16, vocab_size=64, rope=rope, init_std=0.3
    )
    model = Decoder(config, attend).double()
    init_parameters_(model, 0, config)
    return model


def logits_of(model, lengths, rope_id=None):
    """Documents of these lengths, each starting with the same tokens."""
    ids = dense.positions(lengths) * 7 % 64
    return model(ids, dense.positions(lengths), rope_id, layout=dense.packed(lengths))


@pytest.mark.parametrize("rope_id", [None, torch.zeros(sum(LENGTHS), dtype=torch.int64)])
def test_a_mixed_pack_equals_separate_runs(rope_id):
    """Documents up to 16 tokens as the original model, longer ones as the extended one; gradients too."""
    mixed = model_of(replace(YARN, mixed_window=True))
    parts = [model_of(YARN if length > 16 else PLAIN) for length in LENGTHS]
    alone = [logits_of(model, (length,)) for model, length in zip(parts, LENGTHS, strict=True)]
    found = logits_of(mixed, LENGTHS, rope_id)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    torch.cat(alone).square().sum().backward()
    gradients = [dict(model.named_parameters()) for model in parts]
    for name, parameter in mixed.named_parameters():
        total = sum(each[name].grad for each in gradients)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits_of(parts[1], LENGTHS), found, rtol=1e-3)


def test_rope_id_asks_for_the_extended_set_in_a_short_document():
    mixed, ones = model_of(replace(YARN, mixed_window=True)), torch.ones(10, dtype=torch.int64)
    torch.testing.assert_close(logits_of(mixed, (10,), ones), logits_of(model_of(YARN), (10,)))
    assert not torch.allclose(logits_of(mixed, (10,)), logits_of(mixed, (10,), ones))


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(type="dynamic", theta=1e3, factor=4.0, original_len=16),
        RopeConfig(type="dynamic_yarn", theta=1e3, original_len=16),
        RopeConfig(
            type="longrope",
            theta=1e3,
            factor=4.0,
            original_len=16,
            short_factor=(1.0,) * 8,
            long_factor=(4.0,) * 8,
        ),
    ],
)
def test_each_document_of_a_pack_takes_the_frequencies_of_its_own_length(rope):
    model = model_of(rope)
    alone = torch.cat([logits_of(model, (length,)) for length in LENGTHS])
    torch.testing.assert_close(logits_of(model, LENGTHS), alone, rtol=1e-12, atol=1e-12)
    fixed, _ = rope_parameters(replace(rope, head_dim=16), 40)
    table = model.frequencies.table(
        dense.positions((40,)), None, dtype=torch.float64, layout=dense.packed((40,))
    )
    angles = dense.positions((40,)).double()[:, None] * fixed
    torch.testing.assert_close(table.sin[:, 0] / table.cos[:, 0], angles.tan(), rtol=1e-9, atol=1e-9)
    assert logits_of(model, ()).shape == (0, 64)


def test_every_rank_knows_the_length_of_its_tokens_documents():
    ends = [0, 10, 50, 66, 83, 83]
    for rank in range(4):
        layout = SequenceLayout.build(ends, ring=2, ulysses=2, ring_rank=rank // 2, ulysses_rank=rank % 2)
        expected = torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS))[layout.token_index]
        assert torch.equal(token_lengths(layout), expected)


def test_layers_without_positions_do_not_turn():
    """With NoPE in every layer a permutation of the first tokens changes nothing for the last."""
    full, none = model_of(replace(PLAIN, none_layers=(0, 1, 2))), model_of(RopeConfig(type="none"))
    torch.testing.assert_close(logits_of(full, (20,)), logits_of(none, (20,)), rtol=1e-12, atol=1e-12)
    some = logits_of(model_of(replace(PLAIN, none_layers=(1,))), (20,))
    assert not torch.allclose(some, logits_of(model_of(PLAIN), (20,)))
    turned = []

    def attend(q, k, v, **options):
        turned.append(q)
        return dense.attend(q, k, v, **options)

    logits_of(model_of(replace(PLAIN, none_layers=(1,)), attend), (20,))
    assert len(turned) == 3


def test_partial_rotary_turns_the_first_dims_alone():
    config = RopeConfig(head_dim=16, partial_rotary_factor=0.5)
    frequencies = Frequencies.of(config)
    assert frequencies.inv_freq.shape == (1, 4)
    torch.testing.assert_close(frequencies.inv_freq[0], rope_parameters(RopeConfig(head_dim=8))[0])
    x = torch.randn(6, 2, 16, dtype=torch.float64, requires_grad=True)
    table = frequencies.table(torch.arange(6), None, dtype=torch.float64)
    small = Frequencies.of(RopeConfig(head_dim=8)).table(torch.arange(6), None, dtype=torch.float64)
    turned = rotate(x, table)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8], small))
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))
