"""The loop that reads a text: every token once, and what it says of the score."""

import math

import numpy as np
import pytest
import torch
from fairseq.models import FairseqLanguageModel
from torch import nn

from fairseq_sha.commands import main
from fairseq_sha.data.codecs import ByteCodec, WordCodec
from fairseq_sha.evaluation.evaluate import Score, evaluate
from fairseq_sha.evaluation.policies import Carried, Sliding
from fairseq_sha.models.segment_decoder import SegmentDecoder
from tests.models.test_segment_decoder import Summing


class Text:
    """Random tokens of a codec, without a folder."""

    def __init__(self, size, vocabulary):
        self.tokens = np.random.randint(4, vocabulary, size)

    def __len__(self):
        return len(self.tokens) - 1


class LastTokens(nn.Module):
    """Mean of the last few inputs: a layer without state."""

    reach = 3

    def forward(self, h, state, context):
        padded = torch.cat([h.new_zeros(self.reach, *h.shape[1:]), h])
        return sum(padded[i : i + len(h)] for i in range(1, self.reach + 1)), {}


@pytest.fixture
def codec():
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(str(value) for value in range(97, 109))]
    return ByteCodec.from_symbols(symbols)


def model(codec, layer):
    decoder = SegmentDecoder(codec.dictionary, [layer], width=4)
    nn.init.normal_(decoder.head.bias)
    return FairseqLanguageModel(decoder).eval()


def expected_costs(model, text):
    """Of the whole text in one pass."""
    tokens = torch.from_numpy(text.tokens)
    with torch.no_grad():
        logits = model.decoder(tokens[None, :-1])[0][0]
    return nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()


@pytest.mark.parametrize("length", [1, 7, 500])
def test_carried_state_gives_the_cost_of_one_pass(codec, length):
    text, summing = Text(100, 16), model(codec, Summing())
    score, costs = evaluate(summing, text, "test", codec, Carried(1, length))
    expected = expected_costs(summing, text)
    np.testing.assert_allclose(costs, expected, rtol=1e-4)
    assert score.nats == pytest.approx(expected.sum(), rel=1e-6)
    assert score.tokens == score.bytes == 99 and score.words is None


@pytest.mark.parametrize("streams", [2, 5, 150])
def test_streams_are_put_back_in_order(codec, streams):
    """Each starts from nothing, so that costs differ from those of one pass there."""
    text, summing = Text(100, 16), model(codec, Summing())
    score, costs = evaluate(summing, text, "test", codec, Carried(streams, 8))
    assert not np.isnan(costs).any() and score.tokens == 99
    longest = -(-99 // streams)
    np.testing.assert_allclose(costs[:longest], expected_costs(summing, text)[:longest], rtol=1e-4)
    assert score.nats == pytest.approx(costs.astype(float).sum(), rel=1e-5)


@pytest.mark.parametrize("windows, stride", [(1, 1), (4, 5), (3, 200)])
def test_sliding_window_gives_a_stateless_model_its_context(codec, windows, stride):
    """With as much context as it can use, a token costs what it costs in one pass."""
    text, stateless = Text(100, 16), model(codec, LastTokens())
    expected = expected_costs(stateless, text)
    policy = Sliding(windows, LastTokens.reach - 1, stride)
    _, costs = evaluate(stateless, text, "test", codec, policy)
    np.testing.assert_allclose(costs, expected, rtol=1e-4)
    _, without = evaluate(stateless, text, "test", codec, Carried(1, 5, has_state=False))
    assert abs(without - expected).max() > 0.01


def test_score_says_its_policy_and_its_denominators():
    score = Score(nats=100.0, tokens=50, bytes=200, words=25, policy="by hand")
    assert score.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert score.perplexity == pytest.approx(math.e**2)
    assert score.perplexity_per_word == pytest.approx(math.e**4)
    for part in ("50 tokens", "200 bytes", "25 words", "by hand", "2.0000 nats per token"):
        assert part in str(score)
    assert "perplexity 7.389 per token, 54.598 per word" in str(score)
    impossible = str(score._replace(nats=10_000.0))
    assert "perplexity 7.226e+86 per token, 5.221e+173 per word" in impossible
    assert "state carried, 8 streams, segments of 64" == str(Carried(8, 64))
    assert "stride 5" in str(Sliding(1, 7, 5)) and "at least 7" in str(Sliding(1, 7, 5))


def test_words_count_the_bytes_of_the_text():
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "the", "of", "Wikipedia"]
    codec = WordCodec.from_symbols(symbols)
    text = Text(3, 7)
    text.tokens = np.array([2, 4, 6, 2, 5])  # the Wikipedia </s> of
    score, _ = evaluate(model(codec, Summing()), text, "test", codec, Carried(1, 2))
    assert score.tokens == 4 and score.words == 4
    assert score.bytes == int(codec.bytes_per_token()[text.tokens[1:]].sum())


@pytest.mark.parametrize(
    "words", [["evaluate"], ["tune-dynamic", "--dynamic=sgd"], ["quantize", "--data"]]
)
def test_symbols_are_those_of_the_data_that_are_read(tmp_path, capsys, words):
    """Otherwise the text of --data-bin would be read in place of DATA."""
    (tmp_path / "data").mkdir()
    words = [*words, str(tmp_path / "data"), "--path", "x.pt", "--data-bin", str(tmp_path)]
    assert main(words) == 1
    assert f"--data-bin {tmp_path}: the symbols are those of" in capsys.readouterr().err
