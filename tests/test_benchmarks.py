"""Parts of the benchmarks that no other test runs."""

import importlib

import torch

from fairseq_sha import compatibility
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.commands import REPOSITORY


def test_generation_is_timed_after_the_text_before(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "flush_denormals", lambda: None)  # of the whole process
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    generation = importlib.import_module("generation")
    path = random_checkpoint.write(tmp_path / "model.pt", window=500)
    (model,) = TrainedModel.load(path, cpu=True).models
    tokens = torch.randint(4, 12, (201, 1))
    monkeypatch.setattr(generation, "random_tokens", lambda *shape: tokens)
    with torch.no_grad():
        expected, _ = model.decoder(tokens[:200].t())
    logits = []
    model.decoder.register_forward_hook(lambda *call: logits.append(call[-1][0]))
    assert generation.steps_per_second(model, 200) > 0
    assert len(logits) == generation.STEPS + 1
    torch.testing.assert_close(logits[-1], expected[:, -1:], atol=1e-4, rtol=1e-4)
