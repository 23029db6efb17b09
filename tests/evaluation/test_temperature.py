"""A temperature that is fitted on one split: the best of those tried, for every kind of model."""

import numpy as np
import pytest
import torch
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from torch import nn

from fairseq_sha.evaluation import temperature
from fairseq_sha.evaluation.evaluate import evaluate
from fairseq_sha.evaluation.policies import Carried, Sliding
from fairseq_sha.evaluation.temperature import FACTORS, fit_temperature
from fairseq_sha.models.segment_decoder import SegmentDecoder
from tests.evaluation.test_evaluate import Text, codec  # noqa: F401
from tests.models.test_segment_decoder import Summing

VOCABULARY = 16


class Bigrams(FairseqDecoder):
    """A model of a kind that fairseq has, which looks at the last token only."""

    def __init__(self, dictionary):
        super().__init__(dictionary)
        self.logits = nn.Parameter(2 * torch.randn(len(dictionary), len(dictionary)))

    def forward(self, prev_output_tokens, src_lengths=None):
        return self.logits[prev_output_tokens], None


def sampled(logits, size, factor):
    """A text in which each token follows the one before as these logits say, times a factor."""
    text = Text(size, VOCABULARY)
    for i in range(1, size):
        probabilities = (factor * logits[text.tokens[i - 1], 4:]).softmax(0)
        text.tokens[i] = 4 + int(torch.multinomial(probabilities, 1))
    return text


def costs(logits, text, factor):
    inputs, targets = torch.from_numpy(text.tokens[:-1]), torch.from_numpy(text.tokens[1:])
    return nn.functional.cross_entropy(factor * logits[inputs], targets, reduction="none")


@pytest.mark.parametrize("policy", [Carried(3, 50, has_state=False), Sliding(4, 3, 9)])
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.2])
def test_factor_is_the_best_one(codec, factor, policy):  # noqa: F811
    model = FairseqLanguageModel(Bigrams(codec.dictionary)).eval()
    logits = model.decoder.logits.detach()
    with torch.no_grad():
        model.decoder.logits[:, :4] = -1e4  # no text
    valid, test = sampled(logits, 1500, factor), sampled(logits, 100, factor)
    fit = fit_temperature(model, valid, "valid", codec, policy)
    totals = [float(costs(logits, valid, f).double().sum()) for f in FACTORS]
    assert fit.factor == FACTORS[int(np.argmin(totals))]
    assert fit.factor == pytest.approx(min(max(factor, 0.8), 1.06), abs=0.08)
    assert ("the end of the range" in str(fit)) == (fit.factor in (0.8, 1.06))
    score, found = evaluate(model, test, "test", codec, policy, losses=fit.losses())
    np.testing.assert_allclose(found, costs(logits, test, fit.factor), rtol=1e-4, atol=1e-5)
    assert score.nats == pytest.approx(float(found.sum()), rel=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 3, 1 << 20])
def test_models_with_state_carry_it_and_take_a_few_rows_at_a_time(
    codec,  # noqa: F811
    monkeypatch,
    rows_at_once,
):
    monkeypatch.setattr(temperature, "MAX_LOGITS", rows_at_once * len(codec.dictionary))
    decoder = SegmentDecoder(codec.dictionary, [Summing()], width=4)
    model, text = FairseqLanguageModel(decoder).eval(), Text(80, VOCABULARY)
    with torch.no_grad():
        logits = decoder(torch.from_numpy(text.tokens)[None, :-1])[0][0]
    targets = torch.from_numpy(text.tokens[1:])
    totals = [nn.functional.cross_entropy(f * logits, targets).item() for f in FACTORS]
    fit = fit_temperature(model, text, "valid", codec, Carried(1, 7))
    assert fit.factor == FACTORS[int(np.argmin(totals))]
    score, _ = evaluate(model, text, "test", codec, Carried(1, 9), losses=fit.losses())
    assert score.nats == pytest.approx(79 * min(totals), rel=1e-4)
