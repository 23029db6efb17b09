"""minGRU and minLSTM: as a language model, against itself."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.min_rnn import CausalConvolution, MinRNNConfig, MinRNNDecoder
from tests.conftest import dictionary_of
from tests.models.helpers import (
    VOCABULARY,
    check_cuts,
    check_one_token_at_a_time,
    randomise,
    record_dropout,
)


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


def by_hand(model, tokens):
    """Logits ``[T, V]`` of one stream, as the paper's block and the config's help have it."""

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    h = model.embedding.weight[tokens]
    for layer in model.layers:
        x = norm(h, layer.norm)
        taps = layer.convolution.conv.weight[:, 0]
        padded = torch.cat([torch.zeros(taps.size(1) - 1, x.size(1)), x])
        x = layer.convolution.conv.bias + sum(
            taps[:, k] * padded[k : k + len(x)] for k in range(taps.size(1))
        )
        candidate, gate = (x @ layer.cell.input.weight.t()).chunk(2, -1)
        state, states = torch.zeros_like(candidate[0]), []
        for c, z in zip(candidate, gate.sigmoid()):
            state = (1 - z) * state + z * torch.where(c >= 0, c + 0.5, c.sigmoid())
            states.append(state)
        h = h + torch.stack(states) @ layer.cell.output.weight.t()
        inner, outer = layer.feed_forward.linear1, layer.feed_forward.linear2
        wide = norm(h, layer.norm_feed_forward) @ inner.weight.t() + inner.bias
        wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))  # GELU
        h = h + wide @ outer.weight.t() + outer.bias
    return norm(h, model.final_norm) @ model.embedding.weight.t() + model.head.bias


def test_equals_the_block_written_out():
    model = randomise(decoder(conv_width=3))
    tokens = torch.randint(VOCABULARY, (2, 11))
    expected = torch.stack([by_hand(model, stream) for stream in tokens])
    torch.testing.assert_close(model(tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_starts_with_a_small_embedding():
    """It is the output too: logits of a new model are near 0."""
    model = decoder(width=256)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.head.bias == 0).all()


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


@pytest.mark.parametrize("name", ["min_gru_enwik8", "min_lstm_enwik8"])
def test_named_architectures_are_about_as_large_as_sha_rnn(name):
    cfg = FAMILIES["min_rnn"].architectures[name]
    with torch.device("meta"):
        model = MinRNNDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(54, abs=5)


def test_dropout_falls_on_embeddings_and_sublayers(monkeypatch):
    seen = record_dropout(monkeypatch, "models.min_rnn", "models.segment_decoder")
    decoder(num_layers=1, dropout=0.1)(torch.randint(29, (3, 5)))
    assert seen == [((5, 3, 16), 0.1)] * 3


def test_dropout_acts_in_training_only():
    model = decoder(dropout=0.5)
    tokens = torch.randint(29, (3, 20))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert (model.embed(tokens.t(), training=True) == 0).float().mean() == pytest.approx(
        0.5, abs=0.1
    )
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(expansion=0.0), "--expansion"),
        (dict(width=49, expansion=0.99 / 49), "--expansion"),
        (dict(conv_width=-1), "--conv-width"),
        (dict(d_inner=0), "--d-inner"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
