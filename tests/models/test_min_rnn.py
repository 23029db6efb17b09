"""minGRU and minLSTM: as a language model, against itself."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.min_rnn import (
    CausalConvolution,
    MinGRUEnwik8Config,
    MinLSTMEnwik8Config,
    MinRNNConfig,
    MinRNNDecoder,
)
from tests.conftest import dictionary_of
from tests.models.helpers import check_cuts, check_one_token_at_a_time


def decoder(**fields):
    small = dict(width=16, num_layers=2, d_inner=32)
    cfg = OmegaConf.structured(MinRNNConfig(**{**small, **fields}))
    return MinRNNDecoder(cfg, dictionary_of(29))


VARIANTS = [dict(cell=cell, conv_width=size) for cell in ("min_gru", "min_lstm") for size in (0, 4)]


@pytest.mark.parametrize("fields", VARIANTS)
def test_one_token_at_a_time_equals_the_segment_pass(fields):
    check_one_token_at_a_time(decoder(**fields).eval(), 20, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS)
def test_cutting_otherwise_changes_nothing(fields):
    check_cuts(decoder(**fields).eval(), [24], [7, 1, 2, 14], atol=1e-4, rtol=1e-4)


def test_convolution_sees_itself_and_what_came_before():
    convolution = CausalConvolution(3, 4)
    x = torch.randn(9, 2, 3)
    out, left = convolution(x, {})
    for t in range(9):
        expected = convolution.conv.bias.expand(2, 3).clone()
        for back in range(min(4, t + 1)):
            expected += convolution.conv.weight[:, 0, 3 - back] * x[t - back]
        torch.testing.assert_close(out[t], expected)
    assert torch.equal(left["conv"], x[-3:])
    short, left = convolution(x[:2], {})  # shorter than what it sees
    assert torch.equal(left["conv"], torch.cat([torch.zeros(1, 2, 3), x[:2]]))
    assert CausalConvolution(3, 1)(x, {})[1]["conv"].shape == (0, 2, 3)


@pytest.mark.parametrize("cfg", [MinGRUEnwik8Config, MinLSTMEnwik8Config])
def test_named_architectures_are_about_as_large_as_sha_rnn(cfg):
    with torch.device("meta"):
        model = MinRNNDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(54, abs=5)


def test_dropout_acts_in_training_only():
    model = decoder(dropout=0.5)
    tokens = torch.randint(29, (3, 20))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(expansion=0.0), "--expansion"),
        (dict(conv_width=-1), "--conv-width"),
        (dict(d_inner=0), "--d-inner"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
