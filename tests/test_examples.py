"""Recipes follow their papers and name what exists: a mistyped field would cost a user a run."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.optim.lr_scheduler.fixed_schedule import FixedLRSchedule
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from fairseq_sha.models import family
from tests.conftest import dictionary_of
from tests.models.helpers import VOCABULARY, check_cuts, check_one_token_at_a_time

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples").glob("*/*.yaml"))
EVALUATIONS = sorted((ROOT / "examples").glob("*/evaluation/*.yaml"))
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
    known = {"tokens_per_sample", "context_window", "batch_size", "answers_after"}
    assert set(settings) <= known


LAMB = {"_name": "min_trust_lamb", "min_trust": 0.25}
ADAGRAD = {"_name": "clipped_adagrad", "adagrad_clip": 0.03}
RADAM = {"_name": "radam", "weight_decay": 0.1}
ADAM = {"_name": "adam"}
SGD = {"_name": "momentum_sgd", "momentum": 0.99}


def published(name):
    """A recipe in its paper: optimiser, schedule, length and learning rate, streams, segment."""

    def schedule(kind, warmup, **more):
        return {"_name": kind, "warmup_updates": warmup, **more}

    def length(rate, updates, **more):
        return {"lr": [rate], "max_update": updates, **more}

    if name.startswith("sha"):
        epochs, halved = (18, 16) if name.endswith("full") else (25, 24)  # the first at half rate
        rates = [2e-3] * (halved - 1) + [1e-3] * (epochs - halved + 1)
        run = {"lr": rates, "clip_norm": 0.25, "max_epoch": epochs}
        return LAMB, schedule("fixed", 800), run, 8 if name.endswith("full") else 16, 1024
    if name == "transformer_xl_wt103":
        run = length(2.5e-4, 200_000, clip_norm=0.25)
        return ADAM, schedule("cosine", 0), run, 60, 150
    if name == "transformer_xl_wt103_large":
        run = length(2.5e-4, 4_000_000, clip_norm=0.25)
        return ADAM, schedule("cosine_annealing", 16_000), run, 128, 384
    if name.startswith("transformer_xl"):
        run = length(2.5e-4, 400_000, clip_norm=0.25)
        layers = name[-3:]
        streams, tokens = {"12l": (22, 512), "18l": (64, 784), "24l": (64, 768)}[layers]
        return ADAM, schedule("cosine", 0 if layers == "12l" else 4000), run, streams, tokens
    if name.startswith("adaptive_span"):
        run = length(0.07, 600_000 if name == "adaptive_span_enwik8" else 150_000)
        small = name.endswith("small")
        warmup = 8000 if small else 32_000
        return ADAGRAD, schedule("fixed", warmup), run, 64, 256 if small else 512
    if name.startswith(("melis_lstm", "mogrifier_lstm")):
        rates = {
            "melis_lstm_enwik8": 0.0025167,
            "melis_lstm_enwik8_96m": 0.001975,
            "mogrifier_lstm_enwik8": 0.0010214,
            "mogrifier_lstm_enwik8_96m": 0.002248,
        }
        run = length(rates[name], 100 * 400, clip_norm=10 / 500)
        rmsprop = {"_name": "adam", "adam_betas": "(0.0, 0.999)", "adam_eps": 2e-11}
        return rmsprop, schedule("fixed", 0), run, 128, 500
    if name.startswith("rhn"):
        run = {"lr": [0.2 * 50], "clip_norm": 10 / 50, "max_epoch": 500}
        annealing = schedule("fixed", 0, force_anneal=6, lr_shrink=pytest.approx(1 / 1.03))
        return {**SGD, "momentum": 0.0}, annealing, run, 128, 50
    if name in ("t12_enwik8", "t64_enwik8"):
        run = length(0.003, 4_000_000, clip_norm=0.0)
        return SGD, schedule("fixed", 0), run, 16, 512
    if name == "sparse_transformer_enwik8":
        run = length(3.5e-4, 73_250, clip_norm=1.0)
        return {**ADAM, "weight_decay": 0.01}, schedule("cosine", 5000), run, 8, 12_288
    if name == "awd_lstm_enwik8":
        rates = [1e-3] * 25 + [1e-4] * 10 + [1e-5]  # the last for all further epochs
        run = {"lr": rates, "clip_norm": 0.25, "max_epoch": 50}
        return {"_name": "l2_adam", "weight_decay": 1.2e-6}, schedule("fixed", 0), run, 128, 200
    if name == "awd_lstm_wt2":
        run = {"lr": [30.0], "clip_norm": 0.25, "max_epoch": 750}
        sgd = {**SGD, "momentum": 0.0, "weight_decay": 1.2e-6}
        return sgd, schedule("fixed", 0), run, 80, 70
    if name == "awd_qrnn_wt103":
        run = {"lr": [1e-3] * 12 + [1e-4], "clip_norm": 0.25, "max_epoch": 14}
        return ADAM, schedule("fixed", 0), run, 60, 140
    large = name.endswith("large")
    if "lm1b" in name:
        annealing = schedule("cosine_annealing", 16_000, warmup_skips_zero=True)
        run = length(2e-4, 800_000, clip_norm=1.0)
        return RADAM, annealing, run, 1536 if large else 1024, 64
    if "wt103" in name:
        annealing = schedule("cosine_annealing", 16_000)
        run = length(3e-4, 400_000, clip_norm=1.0)
        return RADAM, annealing, run, 64, 1024 if large else 768
    run = length(4e-4 if large else 3e-4, 400_000, clip_norm=1.0)
    annealing = schedule("cosine_annealing", 16_000, warmup_skips_zero=True)
    return RADAM, annealing, run, 64 if large else 32, 1024


#: Folders of recipes, and their data.
OF_PAPERS = {
    "enwik8": "data-bin/enwik8",
    "lm1b": "data-bin/lm1b",
    "wikitext103": "data-bin/wikitext-103",
    "wikitext2": "data-bin/wikitext-2",
}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name in OF_PAPERS], ids=lambda path: path.stem
)
def test_published_recipe(path):
    recipe = OmegaConf.to_container(OmegaConf.load(str(path)))
    optimizer, schedule, run, streams, tokens = published(path.stem)
    assert recipe["optimizer"] == optimizer
    assert recipe["lr_scheduler"] == schedule
    assert recipe["optimization"] == run
    assert recipe["dataset"]["batch_size"] == streams
    assert recipe["task"]["tokens_per_sample"] == tokens
    assert recipe["model"] == {"_name": path.stem} or "18l" in path.stem
    words = path.parent.name != "enwik8"
    own_losses = words or path.stem.startswith(
        ("adaptive_span", "melis", "mogrifier", "rhn", "t12", "t64")
    )
    assert recipe["criterion"] == {"_name": "cross_entropy" + "_with_auxiliary_losses" * own_losses}
    task = recipe["task"]
    assert task["data"] == OF_PAPERS[path.parent.name]
    assert task["_name"] == ("segment" if words else "byte") + "_language_modeling"
    assert task.get("codec") == ("words" if words else None)
    assert recipe["distributed_training"] == {"distributed_world_size": 1}


def test_rhn_has_the_published_learning_rate_in_each_epoch():
    cfg = OmegaConf.load(str(ROOT / "examples" / "enwik8" / "rhn_enwik8.yaml"))
    rate = cfg.optimization.lr[0]
    cfg = OmegaConf.merge(
        OmegaConf.structured(LR_SCHEDULER_DATACLASS_REGISTRY["fixed"]),
        {**cfg.lr_scheduler, "lr": [rate]},
    )
    scheduler = object.__new__(FixedLRSchedule)
    scheduler.cfg = cfg
    for i in range(30):  # the published code counts epochs from 0
        assert scheduler.get_next_lr(i + 1) == pytest.approx(rate / 1.03 ** max(i - 4, 0))


@pytest.mark.parametrize("name", ["melis_lstm_enwik8", "mogrifier_lstm_enwik8_96m"])
def test_recipes_of_the_mogrifier_lstm_drop_states_and_average_weights(name):
    recipe = OmegaConf.load(str(ROOT / "examples" / "enwik8" / f"{name}.yaml"))
    assert recipe.task.drop_state_probability == 0.01
    per_epoch = 90_000_000 // (recipe.dataset.batch_size * recipe.task.tokens_per_sample)
    assert recipe.dataset.validate_interval_updates == 400
    assert recipe.optimization.max_update == 100 * 400
    # Validations at the ends of epochs would count, too.
    assert recipe.dataset.validate_interval * per_epoch > recipe.optimization.max_update
    averaging = {key: value for key, value in recipe.task.items() if key.startswith("average")}
    expected = {"average_weights": "stalled", "average_patience": 10, "average_latest": 80}
    assert averaging == expected


def test_recipe_of_wikitext2_is_nt_asgd():
    task = OmegaConf.load(str(ROOT / "examples" / "wikitext2" / "awd_lstm_wt2.yaml")).task
    assert task.average_weights == "non_monotone" and task.average_patience == 5
    assert task.random_segment_lengths and task.scale_lr_by_length


def test_model_of_the_readme_carries_its_state(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = [block for block in blocks if "@register_family" in block]
    path = tmp_path / "my_model.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(family.FAMILIES["my_model"].architectures) == {"my_model_large"}
    task = SimpleNamespace(source_dictionary=dictionary_of(VOCABULARY))
    model = module.MyModel.build_model(OmegaConf.structured(module.MyConfig()), task)
    check_one_token_at_a_time(model.decoder.eval(), 9)
    check_cuts(model.decoder, [12], [5, 1, 6])
