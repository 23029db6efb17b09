"""What the tuning stage of a comparison may change: a space file, and points of the space.

A space is a unit cube, the same for all models. The space file says what each coordinate means.
"""

import copy
import warnings
from typing import NamedTuple

import yaml

from fairseq_sha.compare import recipe as recipes
from fairseq_sha.errors import UserError

WIDENINGS = 2  # of a range, at most
OCTAVE = 2.0  # by which a range grows
WARMUP = "warmup_share"  # a field that stands for the scheduler's own one
WARMUP_FIELDS = ("lr_scheduler.warmup_updates", "lr_scheduler.warmup_steps")  # of schedulers
KINDS = ("factor", "log", "range", "choices", "multiples")
RELATIVE = ("factor", "multiples")  # multiply what a recipe has
#: Whole numbers that stay so, beside those of models. YAML may write others as such, too.
COUNTS = ("dataset.batch_size", "dataset.max_tokens", "task.tokens_per_sample")
OPTIONS = {*KINDS, "fields", "widen", "speed"}


class Setting(NamedTuple):
    """One coordinate of the cube.

    name: as the space file has it
    kind: ``factor``: multiplies what a recipe has, log-uniform; ``log``: log-uniform; ``range``:
        uniform; ``choices``: one of some values; ``multiples``: multiplies by one of some values
    values: both ends, or the choices
    fields: ``section.field`` of configs; those that a recipe has are set
    widen: whether a best trial at an end of the range widens it
    speed: whether it changes the time of an update
    """

    name: str
    kind: str
    values: tuple
    fields: tuple
    widen: bool = False
    speed: bool = False

    def at(self, coordinate):
        """The value at a coordinate in [0, 1)."""
        if self.kind in ("choices", "multiples"):
            return self.values[int(coordinate * len(self.values))]
        low, high = self.values
        if self.kind == "range":
            return low + coordinate * (high - low)
        return low * (high / low) ** coordinate


class Space(NamedTuple):
    """What is tuned.

    seed: of the Sobol sequence
    settings: the coordinates, the same for all models
    own: at most one more coordinate of each family, by ``model._name``
    """

    seed: int
    settings: tuple
    own: dict

    @classmethod
    def load(cls, path):
        """Read a space file; UserError."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not a space file: {' '.join(str(error).split())}; correct it")
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise UserError(f"{path}: has no `settings`; see examples/head_to_head/tuning")
        unknown = set(content) - {"seed", "settings", "own"}
        if unknown:
            raise UserError(f"{path}: {min(unknown)} is unknown; there are seed, settings and own")
        own = {
            family: _setting(path, f"own.{family}", setting)
            for family, setting in (content.get("own") or {}).items()
        }
        # A setting of its own is called as its field.
        own = {k: s._replace(name=s.fields[0].split(".")[-1]) for k, s in own.items()}
        settings = tuple(_setting(path, *item) for item in content["settings"].items())
        return cls(int(content.get("seed", 1)), settings, own)

    def of(self, model):
        """The settings of a model, by the names of their coordinates."""
        settings = {setting.name: setting for setting in self.settings}
        own = self.own.get(recipes.lookup(model.config, "model._name"))
        return {**settings, "own": own} if own else settings

    def coordinates(self):
        """The names of all coordinates, the same for all models, with a setting of their own or
        without."""
        return [*(setting.name for setting in self.settings), "own"]

    def apply(self, model, point):
        """A model's recipe at a point of the cube.

        Args:
            model (Recipe): the recipe
            point (dict): coordinates by name

        Returns:
            the changed recipe, and the value of each setting that the model has
        """
        config, values = copy.deepcopy(model.config), {}
        for name, setting in self.of(model).items():
            value = _rounded(setting.at(point[name]))
            fields = [field for field in setting.fields if has_field(config, field)]
            for field in fields:
                _set(config, field, value, setting.kind in RELATIVE)
            if fields:
                values[setting.name] = value
        return model._replace(config=config), values

    def values(self, model):
        """The value of each setting in a recipe as it was given."""
        out = {}
        for setting in self.of(model).values():
            field = next((f for f in setting.fields if has_field(model.config, f)), None)
            if field == WARMUP:
                updates = recipes.lookup(model.config, "optimization.max_update")
                key = _warmup_field(model.config)
                out[setting.name] = _rounded(model.config["lr_scheduler"][key] / updates)
            elif field:
                value = recipes.lookup(model.config, field)
                if isinstance(value, list) and setting.kind in ("log", "range"):
                    value = value[0]
                out[setting.name] = 1 if setting.kind in RELATIVE else value
        return out

    def distributions(self, model):
        """What Optuna is told of a model's settings."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        reach = OCTAVE**WIDENINGS
        out = {}
        for setting in self.of(model).values():
            if setting.kind in ("choices", "multiples"):
                out[setting.name] = CategoricalDistribution(setting.values)
            elif setting.kind == "range":
                out[setting.name] = FloatDistribution(*setting.values)
            else:
                low, high = setting.values
                # Both ends are rounded, as all values are.
                out[setting.name] = FloatDistribution(
                    0.999 * low / reach, 1.001 * high * reach, log=True
                )
        return out

    def speed_key(self, model, values):
        """Names a folder for the speed of a model with some values of its settings; ``recipe`` if
        no setting that changes the speed was changed."""
        changed = [
            f"{s.name}-{values[s.name]}"
            for s in self.of(model).values()
            if s.speed and s.name in values
        ]
        return "_".join(changed) or "recipe"

    def as_dict(self):
        """As JSON has it."""
        return {
            "seed": self.seed,
            "settings": {setting.name: setting._asdict() for setting in self.settings},
            "own": {family: setting._asdict() for family, setting in self.own.items()},
        }


def _setting(path, name, content):
    """A setting of a space file; UserError."""
    given = [kind for kind in KINDS if isinstance(content, dict) and kind in content]
    if len(given) != 1 or not set(content) <= OPTIONS:
        raise UserError(
            f"{path}: {name} needs `fields` and one of {', '.join(KINDS)}; it may have `widen` and "
            "`speed`, and nothing else"
        )
    kind, fields = given[0], content.get("fields") or []
    values = content[kind]
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
    if kind == "choices":
        good = isinstance(values, list) and len(values) > 1
    elif kind == "multiples":
        good = numbers and len(values) > 1 and min(values) > 0
    else:
        good = numbers and len(values) == 2 and values[0] < values[1]
        good = good and (kind == "range" or values[0] > 0)
    if not good:
        expected = (
            "two or more" if kind in ("choices", "multiples") else "[low, high] with low < high"
        )
        raise UserError(f"{path}: {name}.{kind} is {values}; give {expected}")
    if not fields or not all(field == WARMUP or field.count(".") >= 1 for field in fields):
        raise UserError(
            f"{path}: {name}.fields is {fields}; give a list of SECTION.FIELD, or {WARMUP}"
        )
    widen, speed = bool(content.get("widen")), bool(content.get("speed"))
    if widen and kind not in ("factor", "log"):
        raise UserError(f"{path}: {name}.widen needs a `factor` or `log` range; remove it")
    return Setting(name, kind, tuple(values), tuple(fields), widen, speed)


def _rounded(value):
    """A value as it is shown and used."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def has_field(config, field):
    return (
        _warmup_field(config) is not None
        if field == WARMUP
        else recipes.lookup(config, field) is not None
    )


def _set(config, field, value, multiply):
    """Change a field of a config that it has."""
    if field == WARMUP:
        set_warmup(config, value)
        return
    *sections, key = field.split(".")
    for section in sections:
        config = config[section]
    if multiply:
        old = config[key]
        value = [v * value for v in old] if isinstance(old, list) else old * value
        is_count = field in COUNTS or field.startswith("model.")
        if is_count and isinstance(old, int) and old > 0:
            value = max(1, round(value))
    elif isinstance(config[key], list) and not isinstance(value, list):
        value = [value for _ in config[key]]  # such as the learning rate of each epoch
    config[key] = value


def _warmup_field(config):
    """The scheduler's number of updates in which the learning rate rises, or None."""
    scheduler = recipes.lookup(config, "lr_scheduler")
    fields = scheduler if isinstance(scheduler, dict) else {}
    keys = (field.split(".")[1] for field in WARMUP_FIELDS)
    return next((key for key in keys if key in fields), None)


def set_warmup(config, share):
    """Let the learning rate of a config rise over a share of all updates. With ``tri_stage``, the
    time until it falls stays the same."""
    scheduler, key = config["lr_scheduler"], _warmup_field(config)
    old, new = scheduler[key], round(share * recipes.lookup(config, "optimization.max_update"))
    scheduler[key] = new
    if key == "warmup_steps" and scheduler.get("hold_steps"):
        scheduler["hold_steps"] = max(0, scheduler["hold_steps"] + old - new)


def sobol(space, number):
    """Points of the scrambled Sobol sequence of Optuna: a list of dicts of coordinates."""
    import optuna

    names = space.coordinates()
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=space.seed)
        study = optuna.create_study(sampler=sampler)
        # The sampler takes its space from a first trial, which is not one of the sequence.
        corner = dict.fromkeys(names, 0.0)
        study.add_trial(
            optuna.trial.create_trial(params=corner, distributions=distributions, value=0.0)
        )
        points = [study.ask(distributions).params for _ in range(number)]
    # A coordinate of one would be beyond the last choice.
    return [{name: min(point[name], 1 - 2**-53) for name in names} for point in points]
