"""The models of a comparison: their configs, their length under a budget, the commands to run."""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fairseq_sha
from fairseq_sha.errors import UserError

PACKAGE = Path(fairseq_sha.__file__).resolve().parent
TOOLS = Path(sys.executable).parent
# Models of these tasks are evaluated by ``fairseq-sha evaluate``, others by fairseq-eval-lm.
OUR_TASKS = {"byte_language_modeling", "segment_language_modeling"}
EVALUATION = {
    *("tokens_per_sample", "batch_size", "context_window", "model_overrides", "answers_after"),
}
CHANGE = re.compile(r"\w+\.[^\s=]+=\S+$")

# Fields of fairseq's schedulers that count updates; the misspelling is fairseq's.
SCHEDULE = {"warmup_updates", "warmup_steps", "hold_steps", "decay_steps", "total_num_update"}
SCHEDULE |= {"lr_period_updates", "lr_deacy_period"}

CALIBRATION_INTERVAL = 5  # updates between two log lines

# The same for all models: only the number of updates decides when a run validates, saves and ends.
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


class Recipe(NamedTuple):
    """One model.

    name: the config's file name without its ending
    config: what fairseq-hydra-train gets
    evaluation: settings that differ in evaluation
    variant: "paper" for the recipe as it was given and "tuned" for what the tuning chose; None in a
        comparison without tuning
    """

    name: str
    config: dict
    evaluation: dict
    variant: Optional[str] = None

    @property
    def folder(self):
        """Where the model's results are, inside the folder of the comparison."""
        return f"paper/{self.name}" if self.variant == "paper" else self.name

    @property
    def title(self):
        return f"{self.name}, paper's recipe" if self.variant == "paper" else self.name


def load(path, data, changes, sections=None):
    """Read a config.

    path (Path): complete YAML for fairseq-hydra-train; settings that differ in evaluation are in a
        file of the same name in the folder ``evaluation`` beside it
    data: data folder, which replaces the config's; None to keep that
    changes (list of str): ``section.field=value``, which take precedence over the files
    sections (Path): YAML of whole sections, such as ``optimizer``, that replace those of the config
    UserError: no such file, not YAML, a malformed change, or a missing or unknown field
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config; give the path of a YAML file")
    beside = path.parent / "evaluation" / path.name
    own = read_yaml(path)
    for name, section in (read_yaml(sections) if sections else {}).items():
        own[name] = section
    in_evaluation = {"evaluation": read_yaml(beside) if beside.is_file() else {}}
    try:
        config = OmegaConf.merge(
            own,
            OmegaConf.create(in_evaluation),
            OmegaConf.from_dotlist(changes),
            OmegaConf.create(COMMON),
            OmegaConf.create({"task": {"data": str(data)}} if data else {}),
        )
        config = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a config: {' '.join(str(error).split())}; correct it")
    evaluation = config.pop("evaluation")
    unknown = set(evaluation) - EVALUATION
    if unknown:
        known = ", ".join(sorted(EVALUATION))
        raise UserError(f"{path}: evaluation.{min(unknown)} is unknown; there are {known}")
    needed = ("optimization.max_update", "task._name", "task.data", "task.tokens_per_sample")
    for field in (*needed, "model"):
        if not lookup(config, field):
            raise UserError(f"{path}: {field} is missing; the comparison needs it, so add it")
    length = evaluation.get("tokens_per_sample", config["task"]["tokens_per_sample"])
    context = evaluation.get("context_window", 0)
    for name, value in (("tokens_per_sample", length), ("context_window", context)):
        if not isinstance(value, int):
            raise UserError(f"{path}: {name} is {value!r}; give a whole number")
    if not length > context:
        raise UserError(
            f"{path}: in evaluation, tokens_per_sample {length} includes the context and must be "
            f"larger than context_window {context}; raise tokens_per_sample"
        )
    return Recipe(path.stem, config, evaluation)


def read_yaml(path):
    """The sections of a YAML file, a DictConfig; UserError."""
    try:
        found = OmegaConf.load(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: not a config: {' '.join(str(error).split())}; correct it")
    if not OmegaConf.is_dict(found):
        raise UserError(f"{path}: not a config, since it has no sections; correct it")
    return found


def grid(variants):
    """The variants that ``--vary`` asks for.

    Args:
        variants (list of str): changes ``section.field=value`` with spaces between them

    Returns:
        the name of each variant and its changes, a dict of lists

    Raises:
        UserError: a change is malformed, or two variants have the same name
    """
    out = {}
    for variant in variants:
        changes = variant.split()
        if not changes or not all(map(CHANGE.match, changes)):
            raise UserError(
                f"--vary '{variant}': give SECTION.FIELD=VALUE, or several of them with spaces "
                "between, such as 'model.attention_layers=[] model.width=268'"
            )
        name = variant_name(changes[0])
        if name in out:
            raise UserError(
                f"--vary '{variant}': another variant is called {name} too; begin each with the "
                "change that makes it different"
            )
        out[name] = changes
    return out


def variant_name(change):
    """A name for a folder: ``attention_layers-0-2`` for ``model.attention_layers=[0,2]``."""
    field, value = change.split("=", 1)
    value = re.sub(r"[^\w.]+", "-", value).strip("-")
    return f"{field.split('.')[-1]}-{value or 'none'}"


def lookup(config, field, default=None):
    """The value of ``section.field``, or the default if it is absent or null."""
    for key in field.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return default if config is None else config


def user_dir(config):
    """``common.user_dir`` as commands get it, or None.

    Configs call this package ``fairseq_sha``, which is a path in a clone only. The installed
    package may be elsewhere, so the name is replaced by the package's folder.
    """
    path = lookup(config, "common.user_dir")
    if path and (Path(path) == Path(PACKAGE.name) or Path(path).resolve() == PACKAGE):
        return str(PACKAGE)
    return path


def runnable(config):
    """The config as fairseq-hydra-train gets it: with the real ``user_dir``."""
    path = user_dir(config)
    return {**config, "common": {**config["common"], "user_dir": path}} if path else config


def is_of_bytes(recipe):
    """Whether a token of the model is a byte, as far as its config says."""
    return lookup(recipe.config, "task.codec", "bytes") == "bytes"


def tokens_per_update(recipe):
    """Mean number of tokens that one update trains on, one device.

    UserError: the config has no dataset.batch_size
    """
    length = lookup(recipe.config, "task.tokens_per_sample")
    streams = lookup(recipe.config, "dataset.batch_size")
    if streams is None:
        raise UserError(f"{recipe.name}: a budget in bytes needs dataset.batch_size; add it")
    if lookup(recipe.config, "task.random_segment_lengths"):
        # Normally distributed with standard deviation 5 around the length (95%) or half of it, cut
        # off at the length and rounded down. In the first case half of the lengths are cut off.
        full = length - 5 / math.sqrt(2 * math.pi) - 0.25
        length = 0.95 * full + 0.05 * (length / 2 - 0.5)
    return length * streams * lookup(recipe.config, "optimization.update_freq", [1])[-1]


def schedule(recipe, updates):
    """The fields of the scheduler that count updates, scaled from the config's own max_update to
    ``updates`` (None: not known yet), and at least 1."""
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


def train_command(recipe, folder, run, seed, updates, validate=True):
    """Train for ``updates`` updates, with about 100 log lines and four validations and checkpoints.

    folder: the model's, which holds recipe.yaml
    run: folder of this run, for checkpoints
    updates: None if it is not known yet; the command is then only for display
    validate: whether there are validations, which give the learning curve
    """
    return hydra_train(
        folder,
        {
            "common.seed": seed,
            **run_length(recipe, updates),
            **({} if validate else {"dataset.disable_validation": "true"}),
            "checkpoint.save_dir": run / "checkpoints",
        },
    )


def multirun_command(recipe, folder, seeds, updates, launcher):
    """Train all seeds with one of Hydra's launchers, such as ``submitit_slurm``.

    Each job runs in the folder of its run, where it writes train.log. So all paths are absolute.
    """
    seed = "seed${common.seed}"
    plugin = user_dir(recipe.config)
    return hydra_train(
        folder,
        {
            "hydra/launcher": launcher,
            "hydra.sweep.dir": folder.resolve(),
            "hydra.sweep.subdir": seed,
            "hydra.job_logging.handlers.file.filename": "train.log",
            "hydra.job_logging.formatters.simple.format": "%(message)s",
            "common.seed": ",".join(map(str, seeds)),
            **({"common.user_dir": Path(plugin).resolve()} if plugin else {}),
            "task.data": Path(recipe.config["task"]["data"]).resolve(),
            **run_length(recipe, updates),
            "checkpoint.save_dir": folder.resolve() / seed / "checkpoints",
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
    """Train for ``seconds``, without validation or checkpoints, to measure the speed."""
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
    """fairseq-hydra-train on ``folder/recipe.yaml`` with some settings changed."""
    command = [TOOLS / "fairseq-hydra-train", "--config-dir", folder, "--config-name", "recipe"]
    # Without this Hydra also writes a log file of its own.
    command += ["--multirun"] if multirun else ["hydra/job_logging=stdout"]
    for field, value in settings.items():
        value = str(value)
        # A comma separates values of several runs, as the seeds are.
        if field != "common.seed" and not re.fullmatch(r"[\w./:*+-]+", value):
            value = "'" + value.replace("'", r"\'") + "'"  # Hydra's own quotes
        command.append(f"{field}={value}")
    return [str(word) for word in command]


def flops_command(folder):
    """Count the operations of ``folder/recipe.yaml`` into flops.json, in a process of its own."""
    command = [sys.executable, "-m", PACKAGE.name, "flops", "--config", folder / "recipe.yaml"]
    return [str(word) for word in [*command, "--json", folder / "flops.json"]]


def is_ours(config):
    """Whether a model is trained with a task of this package."""
    return config["task"]["_name"] in OUR_TASKS


def eval_command(recipe, run, split, streams):
    """Evaluate the last checkpoint of a run on a split.

    streams: batch size, unless the recipe sets its own
    """
    config, settings = recipe.config, recipe.evaluation
    length = settings.get("tokens_per_sample", config["task"]["tokens_per_sample"])
    plugin = user_dir(config)
    if is_ours(config):
        command = [sys.executable, "-m", PACKAGE.name, "evaluate", config["task"]["data"]]
        command += ["--split", split, "--json", run / f"{split}.json"]
        if plugin == str(PACKAGE):  # the command registers it
            plugin = None
    else:
        command = [TOOLS / "fairseq-eval-lm", config["task"]["data"], "--gen-subset", split]
        command += ["--task", config["task"]["_name"]]
    command += ["--path", run / "checkpoints" / "checkpoint_last.pt"]
    command += ["--tokens-per-sample", length]
    command += ["--batch-size", settings.get("batch_size", streams)]
    if settings.get("context_window"):
        command += ["--context-window", settings["context_window"]]
    if settings.get("answers_after"):
        command += ["--answers-after", settings["answers_after"]]
    if settings.get("model_overrides"):
        command += ["--model-overrides", settings["model_overrides"]]
    if plugin:
        command += ["--user-dir", plugin]
    if lookup(config, "common.cpu"):
        command += ["--cpu"]
    return [str(word) for word in command]
