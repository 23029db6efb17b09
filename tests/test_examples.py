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
REGISTRIES = {
    "model": MODEL_DATACLASS_REGISTRY,
    "task": TASK_DATACLASS_REGISTRY,
    "criterion": CRITERION_DATACLASS_REGISTRY,
    "optimizer": OPTIMIZER_DATACLASS_REGISTRY,
    "lr_scheduler": LR_SCHEDULER_DATACLASS_REGISTRY,
}


def test_there_are_recipes():
    assert len(CONFIGS) >= 4


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


@pytest.mark.parametrize("name, epochs", [("sha_rnn_enwik8", 25), ("sha_rnn_enwik8_full", 18)])
def test_published_schedule(name, epochs):
    (path,) = [path for path in CONFIGS if path.stem == name]
    recipe = OmegaConf.load(str(path))
    rates = list(recipe.optimization.lr)
    assert len(rates) == recipe.optimization.max_epoch == epochs
    halved = 24 if name == "sha_rnn_enwik8" else 16  # the first epoch at half rate
    assert rates == [2e-3] * (halved - 1) + [1e-3] * (epochs - halved + 1)
    assert recipe.dataset.batch_size == (16 if name == "sha_rnn_enwik8" else 8)
