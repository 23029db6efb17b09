"""Every recipe names things that exist: a mistyped field would otherwise cost a user a run."""

from pathlib import Path

import pytest
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

CONFIGS = sorted((Path(__file__).parent.parent / "examples").glob("*/*.yaml"))
EVALUATIONS = sorted((Path(__file__).parent.parent / "examples").glob("*/evaluation/*.yaml"))
REGISTRIES = {
    "model": MODEL_DATACLASS_REGISTRY,
    "task": TASK_DATACLASS_REGISTRY,
    "criterion": CRITERION_DATACLASS_REGISTRY,
    "optimizer": OPTIMIZER_DATACLASS_REGISTRY,
    "lr_scheduler": LR_SCHEDULER_DATACLASS_REGISTRY,
}


def test_there_are_recipes():
    assert len(CONFIGS) >= 16 and len(EVALUATIONS) >= 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_names_what_exists(path):
    recipe = OmegaConf.load(str(path))
    for section, fields in recipe.items():
        if section == "hydra":
            continue
        if section in REGISTRIES:
            known = OmegaConf.structured(REGISTRIES[section][fields._name])
        else:
            known = OmegaConf.structured(FairseqConfig)[section]
        OmegaConf.merge(known, fields)  # fails for an unknown field or a value of another type


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_belongs_to_a_recipe(path):
    recipe = OmegaConf.load(str(path.parent.parent / path.name))
    settings = OmegaConf.load(str(path))
    model = OmegaConf.structured(MODEL_DATACLASS_REGISTRY[recipe.model._name])
    OmegaConf.merge(model, settings.pop("model_overrides", {}))
    assert set(settings) <= {"tokens_per_sample", "context_window", "batch_size"}


@pytest.mark.parametrize(
    "name, rate, warmup, updates, batch_size, tokens",
    [
        ("transformer_xl_enwik8_12l", 2.5e-4, 0, 400_000, 22, 512),
        ("transformer_xl_enwik8_18l", 2.5e-4, 4000, 400_000, 64, 784),
        ("transformer_xl_enwik8_24l", 2.5e-4, 4000, 400_000, 64, 768),
        ("adaptive_span_enwik8_small", 0.07, 8000, 150_000, 64, 256),
        ("adaptive_span_enwik8", 0.07, 32_000, 600_000, 64, 512),
        ("adaptive_span_enwik8_large", 0.07, 32_000, 150_000, 64, 512),
    ],
)
def test_published_recipe(name, rate, warmup, updates, batch_size, tokens):
    (path,) = [path for path in CONFIGS if path.stem == name]
    recipe = OmegaConf.load(str(path))
    assert recipe.optimization.lr == [rate] and recipe.optimization.max_update == updates
    assert recipe.lr_scheduler.warmup_updates == warmup
    assert recipe.dataset.batch_size == batch_size and recipe.task.tokens_per_sample == tokens
    assert recipe.model._name == name


@pytest.mark.parametrize("name, epochs", [("sha_rnn_enwik8", 25), ("sha_rnn_enwik8_full", 18)])
def test_published_schedule(name, epochs):
    (path,) = [path for path in CONFIGS if path.stem == name]
    recipe = OmegaConf.load(str(path))
    rates = list(recipe.optimization.lr)
    assert len(rates) == recipe.optimization.max_epoch == epochs
    halved = 24 if name == "sha_rnn_enwik8" else 16  # the first epoch at half rate
    assert rates == [2e-3] * (halved - 1) + [1e-3] * (epochs - halved + 1)
    assert recipe.dataset.batch_size == (16 if name == "sha_rnn_enwik8" else 8)
