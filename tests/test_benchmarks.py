"""Parts of the benchmarks that no other test runs."""

import importlib

import pytest
import torch

from fairseq_sha import compatibility
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.commands import REPOSITORY
from tests.conftest import dictionary_of

FOLDER = REPOSITORY / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by its name."""
    monkeypatch.setattr(compatibility, "flush_denormals", lambda: None)  # of the whole process
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_benchmark_finds_what_it_measures(load, name):
    load(name)


def test_the_optimizer_is_measured_on_the_papers_model(load):
    assert sum(p.numel() for p in load("optimizer").parameters(dictionary_of(205), "cpu")) > 53e6


def test_generation_is_timed_after_the_text_before(tmp_path, monkeypatch, load):
    generation = load("generation")
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
