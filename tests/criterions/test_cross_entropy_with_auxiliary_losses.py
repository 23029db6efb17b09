import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq.models import FairseqLanguageModel

from fairseq_sha.criterions.cross_entropy_with_auxiliary_losses import (
    CrossEntropyWithAuxiliaryLosses,
)
from tests.conftest import dictionary_of
from tests.models.test_adaptive_span import decoder

LOSS = 0.01  # of one token of mean span in each of two layers


@pytest.fixture
def model():
    return FairseqLanguageModel(decoder(adapt_span_loss=LOSS, adapt_span_init=0.5))


def criterion(sentence_avg=False):
    task = SimpleNamespace(target_dictionary=dictionary_of(29))
    return CrossEntropyWithAuxiliaryLosses(task, sentence_avg)


def sample():
    tokens, targets = torch.randint(4, 29, (3, 7)), torch.randint(4, 29, (3, 7))
    targets[2, 4:] = 1  # pads, which are no predictions
    return {"net_input": {"src_tokens": tokens}, "target": targets, "ntokens": 18}


def cross_entropy(model, batch):
    logits = model(batch["net_input"]["src_tokens"])[0].flatten(0, 1)
    targets = batch["target"].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=1, reduction="sum")


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_auxiliary_losses_are_added_per_prediction(model, sentence_avg):
    batch = sample()
    loss, sample_size, _ = criterion(sentence_avg)(model, batch)
    assert sample_size == (3 if sentence_avg else 18)
    span_loss = 2 * LOSS * 0.5 * 20
    torch.testing.assert_close(loss, cross_entropy(model, batch) + 18 * span_loss)
    loss.backward()
    assert model.decoder.layers[0].attention.span.grad.abs().sum() > 0


def test_evaluation_leaves_them_out(model):
    batch = sample()
    model.eval()
    loss, _, logged = criterion()(model, batch)
    torch.testing.assert_close(loss, cross_entropy(model, batch))
    assert set(logged) == {"loss", "nll_loss", "ntokens", "nsentences", "sample_size"}


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_what_is_logged_is_in_bits_and_per_token(model, sentence_avg):
    batches = [sample(), sample()]
    outputs = [criterion(sentence_avg)(model, batch)[2] for batch in batches]
    with metrics.aggregate() as aggregated:
        CrossEntropyWithAuxiliaryLosses.reduce_metrics(outputs)
    values = aggregated.get_smoothed_values()
    bits = sum(cross_entropy(model, batch) for batch in batches).item() / 36 / math.log(2)
    span_bits = 2 * LOSS * 0.5 * 20 / math.log(2)
    assert float(values["nll_loss"]) == pytest.approx(bits, abs=1e-3)
    assert float(values["span_loss"]) == pytest.approx(span_bits, abs=1e-4)
    per_loss = 36 / 6 if sentence_avg else 1
    assert float(values["loss"]) == pytest.approx((bits + span_bits) * per_loss, abs=1e-3)
    assert float(values["ppl"]) == pytest.approx(2**bits, abs=0.02 * 2**bits)
    assert float(values["span_mean"]) == float(values["span_max"]) == pytest.approx(10)
