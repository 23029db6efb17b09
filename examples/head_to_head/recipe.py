"""The models of a comparison: their configs, what a budget makes of them, the commands to run."""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent.parent  # commands run here, as --user-dir expects
TOOLS = Path(sys.executable).parent
EVALUATION = {"tokens_per_sample", "batch_size", "context_window", "model_overrides"}

# Fields of fairseq's schedulers that are counted in updates; the misspelt one is fairseq's.
SCHEDULE = {"warmup_updates", "warmup_steps", "hold_steps", "decay_steps", "total_num_update"}
SCHEDULE |= {"lr_period_updates", "lr_deacy_period"}

CALIBRATION_INTERVAL = 5  # updates between two lines of log

# What is the same for all: only updates end a run, validate it and save it.
NEVER = 10**9  # epochs
COMMON = {
    "hydra": {"run": {"dir": "."}, "output_subdir": None},
    "common": {"log_format": "json", "tensorboard_logdir": None},
    "optimization": {"max_epoch": 0, "stop_time_hours": 0},
    "dataset": {"disable_validation": False, "validate_interval": NEVER},
    "checkpoint": {
        "no_save": False,
        "save_interval": NEVER,
        "keep_interval_updates": 1,
        "no_epoch_checkpoints": True,
    },
}


class UserError(ValueError):
    """Something the user can put right. Its text is one line: what is wrong, and the remedy."""


class Recipe(NamedTuple):
    """One model: the config's name, what fairseq-hydra-train gets, settings of evaluation only."""

    name: str
    config: dict
    evaluation: dict


def load(path, data, changes):
    """Read a config.

    path (Path): complete YAML for fairseq-hydra-train; settings of evaluation only are in a file
        of the same name in the folder ``evaluation`` beside it, if they differ from training's
    data: data folder, in place of the config's
    changes (list of str): ``section.field=value``, applied on top
    UserError: no such file, not YAML, a malformed change, or something needed is missing
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config; give the path of a YAML file")
    beside = path.parent / "evaluation" / path.name
    try:
        config = OmegaConf.merge(
            OmegaConf.load(str(path)),
            OmegaConf.create(
                {"evaluation": OmegaConf.load(str(beside)) if beside.is_file() else {}}
            ),
            OmegaConf.from_dotlist(changes),
            OmegaConf.create(COMMON),
            OmegaConf.create({"task": {"data": str(data)}}),
        )
        config = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a config: {' '.join(str(error).split())}; mend it")
    evaluation = config.pop("evaluation")
    unknown = set(evaluation) - EVALUATION
    if unknown:
        known = ", ".join(sorted(EVALUATION))
        raise UserError(f"{path}: evaluation.{min(unknown)} is unknown; there are {known}")
    for field in ("optimization.max_update", "task._name", "task.tokens_per_sample", "model"):
        if not lookup(config, field):
            raise UserError(f"{path}: {field} is missing; the comparison needs it, so add it")
    length = evaluation.get("tokens_per_sample", config["task"]["tokens_per_sample"])
    context = evaluation.get("context_window", 0)
    if not length > context:
        raise UserError(
            f"{path}: in evaluation, context_window {context} leaves nothing of tokens_per_sample "
            f"{length}, which contains it; raise that"
        )
    return Recipe(path.stem, config, evaluation)


def lookup(config, field, default=None):
    """The value of ``section.field``; the default where it is absent or null."""
    for key in field.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return default if config is None else config


def tokens_per_update(recipe):
    """Mean number of tokens (bytes, for a model of bytes) that one update trains on, one device.

    UserError: the config has no dataset.batch_size
    """
    length = lookup(recipe.config, "task.tokens_per_sample")
    streams = lookup(recipe.config, "dataset.batch_size")
    if streams is None:
        raise UserError(f"{recipe.name}: a budget in bytes needs dataset.batch_size; add it")
    if lookup(recipe.config, "task.random_segment_lengths"):
        # Normal, standard deviation 5, around the length (95%) or half of it; above the length cut
        # off to it, which half of the former are, and rounded down.
        full = length - 5 / math.sqrt(2 * math.pi) - 0.25
        length = 0.95 * full + 0.05 * (length / 2 - 0.5)
    return length * streams * lookup(recipe.config, "optimization.update_freq", [1])[-1]


def schedule(recipe, updates):
    """Those fields of the scheduler that are counted in updates, for a run of so many updates
    (None: not known yet): in proportion to the config's own max_update, 1 at least."""
    nominal = lookup(recipe.config, "optimization.max_update")
    fields = lookup(recipe.config, "lr_scheduler")
    fields = fields if isinstance(fields, dict) else {}

    def scaled(value):
        if updates is None:
            return f"UPDATES*{value}/{nominal}"
        return max(1, round(value * updates / nominal))

    return {
        f"lr_scheduler.{key}": scaled(value)
        for key, value in fields.items()
        if key in SCHEDULE and value is not None and value > 0
    }


def train_command(recipe, folder, run, seed, updates):
    """Train for so many updates; about 100 lines of log, validation and checkpoint by quarters.

    folder: of the model, where recipe.yaml is
    run: folder of this run, for checkpoints
    updates: None where it is not known yet, for a command to look at
    """
    return hydra_train(
        folder,
        {
            "common.seed": seed,
            **run_length(recipe, updates),
            "checkpoint.save_dir": run / "checkpoints",
        },
    )


def multirun_command(recipe, folder, seeds, updates, launcher):
    """Train all seeds through one of Hydra's launchers, such as ``submitit_slurm``. Each job runs
    in the folder of its run, where it writes train.log, so that all paths are absolute."""
    seed = "seed${common.seed}"
    user_dir = lookup(recipe.config, "common.user_dir")
    return hydra_train(
        folder,
        {
            "hydra/launcher": launcher,
            "hydra.sweep.dir": (ROOT / folder).resolve(),
            "hydra.sweep.subdir": seed,
            "hydra.job_logging.handlers.file.filename": "train.log",
            "hydra.job_logging.formatters.simple.format": "%(message)s",
            "common.seed": ",".join(map(str, seeds)),
            **({"common.user_dir": (ROOT / user_dir).resolve()} if user_dir else {}),
            "task.data": (ROOT / recipe.config["task"]["data"]).resolve(),
            **run_length(recipe, updates),
            "checkpoint.save_dir": (ROOT / folder).resolve() / seed / "checkpoints",
        },
        multirun=True,
    )


def run_length(recipe, updates):
    """The settings that depend on the number of updates."""
    if updates is None:
        log_interval, interval = "UPDATES/100", "UPDATES/4"
    else:
        log_interval = max(1, updates // 100)
        quarter = -(-updates // 4)
        interval = -(-quarter // log_interval) * log_interval  # falls on a logged update
    return {
        "common.log_interval": log_interval,
        "optimization.max_update": updates or "UPDATES",
        **schedule(recipe, updates),
        "dataset.validate_interval_updates": interval,
        "checkpoint.save_interval_updates": interval,
    }


def calibration_command(folder, seconds):
    """Train for so many seconds, without validation or checkpoints, to see how fast it is."""
    return hydra_train(
        folder,
        {
            "common.log_interval": CALIBRATION_INTERVAL,
            "optimization.stop_time_hours": f"{seconds / 3600:.6f}",
            "dataset.disable_validation": "true",
            "checkpoint.no_save": "true",
            "checkpoint.save_dir": folder / "calibration",
        },
    )


def hydra_train(folder, settings, multirun=False):
    command = [TOOLS / "fairseq-hydra-train", "--config-dir", folder, "--config-name", "recipe"]
    # Else Hydra writes a log of its own as well.
    command += ["--multirun"] if multirun else ["hydra/job_logging=stdout"]
    for field, value in settings.items():
        value = str(value)
        if not re.fullmatch(r"[\w./:*+,-]+", value):
            value = "'" + value.replace("'", r"\'") + "'"  # Hydra's own quotes
        command.append(f"{field}={value}")
    return [str(word) for word in command]


def eval_command(recipe, run, split, streams):
    """Evaluate the last checkpoint of a run on a split, in so many streams."""
    config, settings = recipe.config, recipe.evaluation
    length = settings.get("tokens_per_sample", config["task"]["tokens_per_sample"])
    command = [TOOLS / "fairseq-eval-lm", config["task"]["data"], "--gen-subset", split]
    command += ["--path", run / "checkpoints" / "checkpoint_last.pt"]
    command += ["--task", config["task"]["_name"], "--tokens-per-sample", length]
    command += ["--batch-size", settings.get("batch_size", streams)]
    if settings.get("context_window"):
        command += ["--context-window", settings["context_window"]]
    if settings.get("model_overrides"):
        command += ["--model-overrides", settings["model_overrides"]]
    if lookup(config, "common.user_dir"):
        command += ["--user-dir", config["common"]["user_dir"]]
    if lookup(config, "common.cpu"):
        command += ["--cpu"]
    return [str(word) for word in command]
