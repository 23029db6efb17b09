"""Dynamic evaluation: the published numbers, and what must hold for every model."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from omegaconf import OmegaConf
from torch import nn

from fairseq_sha.commands import main
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.dynamic import RMS, SGD, Dynamic, Learner, Statistics, collect
from fairseq_sha.evaluation.evaluate import evaluate, token_losses
from fairseq_sha.evaluation.policies import Carried, Sliding, Tokens
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.heads import SoftmaxHead
from fairseq_sha.models.segment_decoder import SegmentDecoder
from fairseq_sha.ops.lstm import lstm
from fairseq_sha.trained_model import TrainedModel
from tests.commands import REPOSITORY, command
from tests.conftest import golden_cases
from tests.options import SHA_RNN
from tests.tiny_corpus import text, write_folder

CASES = golden_cases("dynamic_eval")


def codec_of(size):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(str(value) for value in range(size - 4))]
    return ByteCodec.from_symbols(symbols)


class GoldenLSTM(nn.Module):
    """The layer of the golden model, whose width differs from the embedding's."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))
        self.width = len(self.bias_hh_l0) // 4

    def forward(self, h, state, context):
        start = h.new_zeros(1, h.size(1), self.width)
        weights = self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0
        out, h, c = lstm(h, state.get("h", start), state.get("c", start), *weights)
        return out, {"h": h, "c": c}


def our_name(name):
    return re.sub(
        r"^(encoder|rnn|decoder)\.",
        lambda m: {"encoder": "embedding.", "rnn": "layers.0.", "decoder": "head."}[m[1]],
        name,
    )


def under(case, prefix):
    """What a case has under a prefix, by our names."""
    return {
        f"decoder.{our_name(key[len(prefix) :])}": value
        for key, value in case.items()
        if key.startswith(prefix)
    }


def golden_model(case):
    """The reference's model, in evaluation mode, and a codec with as many symbols."""
    vocabulary, width = case["param/encoder.weight"].shape
    prefix = "param/rnn."
    layer = GoldenLSTM({k[len(prefix) :]: v for k, v in case.items() if k.startswith(prefix)})
    codec = codec_of(vocabulary)
    decoder = SegmentDecoder(codec.dictionary, [layer], width)
    decoder.head = SoftmaxHead(case["param/decoder.weight"].size(1), vocabulary)
    model = FairseqLanguageModel(decoder).eval()
    model.load_state_dict(under(case, "param/"))
    return model, codec


def golden_statistics(model, case):
    """Collected from the case's own text, in its streams."""
    tokens, length = case["stat_tokens"].t(), int(case["setting/bptt"])
    losses = []

    def batches():
        total = tokens.size(1) - 1
        for i, start in enumerate(range(0, total, length)):
            end = min(start + length, total)
            net_input = {"src_tokens": tokens[:, start:end], "segment": f"train:1:{i}"}
            rows = [(0, 0, end - start)] * len(tokens)
            yield {"net_input": net_input, "target": tokens[:, start + 1 : end + 1]}, rows

    def recorded(model, batch):
        costs = token_losses(model, batch)
        losses.append(costs.mean().item())
        return costs

    return collect(model, batches(), recorded), losses


def golden_rule(model, case):
    """What the case's settings say."""
    settings = {k[len("setting/") :]: v.item() for k, v in case.items() if "setting/" in k}
    assert set(settings) in ({"lr", "bptt"}, {"lr", "bptt", "lambda", "epsilon"})
    if "lambda" not in settings:
        return SGD(settings["lr"])
    roots, _ = golden_statistics(model, case)
    return RMS(settings["lr"], settings["lambda"], settings["epsilon"], roots)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_code(name):
    case = CASES[name]
    model, codec = golden_model(case)
    segments = case["segments"].tolist()
    assert max(segments) == case["setting/bptt"]
    tokens = case["tokens"].flatten()[: sum(segments) + 1]
    policy = Dynamic(Carried(1, max(segments)), golden_rule(model, case))

    _, costs = evaluate(model, Tokens(tokens.numpy()), "test", codec, policy)
    means = [part.mean().item() for part in torch.from_numpy(costs).split(segments)]
    np.testing.assert_allclose(means, case["segment_loss"], atol=1e-4)
    assert np.exp(costs.mean()) == pytest.approx(case["perplexity"].item(), rel=1e-4)
    # The weights after the last step.
    batches = policy.batches(Tokens(tokens.numpy()), "test", codec)
    with policy.reading(model, token_losses) as read:
        for i in range(len(batches)):
            read(batches[i])
        after = {key: p.detach().clone() for key, p in model.named_parameters()}
    expected = under(case, "after/")
    assert set(after) == set(expected)
    for key, value in after.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0, msg=key)
    for key, value in under(case, "param/").items():
        torch.testing.assert_close(dict(model.named_parameters())[key].data, value, atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if "stat_tokens" in CASES[name]])
def test_statistics_equal_the_published_code(name):
    case = CASES[name]
    model, _ = golden_model(case)
    roots, losses = golden_statistics(model, case)
    np.testing.assert_allclose(losses, case["stat_loss"], atol=1e-4)
    expected, normalised = under(case, "rms/"), under(case, "rms_norm/")
    rule = golden_rule(model, case)
    assert set(roots) == set(expected) == set(normalised)
    for key, share in zip(roots, rule.decays(list(roots))):
        bound = 1e-3 * expected[key].abs().max() + 1e-8
        assert (roots[key] - expected[key]).abs().max() <= bound, key
        wanted = (rule.decay * normalised[key]).clamp(max=1)
        torch.testing.assert_close(share, wanted, atol=1e-4, rtol=1e-3, msg=key)
