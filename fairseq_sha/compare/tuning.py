"""The tuning stage of a comparison: the same trials for all models, kept by Optuna.

Trial 0 of each model is its recipe, scaled to the budget. The others are points of one scrambled
Sobol sequence in a unit cube, the same for all models; a space file says what each coordinate of
the cube means. Choice is by valid alone. See ``examples/head_to_head/README.md``.
"""

import contextlib
import copy
import fcntl
import json
import math
import shutil
import threading
import warnings
from typing import NamedTuple

import yaml

from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare import runs
from fairseq_sha.compare.logs import read
from fairseq_sha.compare.processes import RunFailed
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

SEED = 0  # of all trials; the final stage has other seeds
WIDENINGS = 2  # at most
OCTAVE = 2.0  # by which a range grows
WARMUP = "warmup_share"  # a field that stands for the scheduler's own one
KINDS = ("factor", "log", "range", "choices", "multiples")
RELATIVE = ("factor", "multiples")  # multiply what a recipe has
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
            fields = [field for field in setting.fields if _has(config, field)]
            for field in fields:
                _set(config, field, value, setting.kind in RELATIVE)
            if fields:
                values[setting.name] = value
        return model._replace(config=config), values

    def values(self, model):
        """The value of each setting in a recipe as it was given."""
        out = {}
        for setting in self.of(model).values():
            field = next((f for f in setting.fields if _has(model.config, f)), None)
            if field == WARMUP:
                updates = recipes.lookup(model.config, "optimization.max_update")
                key = _warmup_field(model.config)
                out[setting.name] = _rounded(model.config["lr_scheduler"][key] / updates)
            elif field:
                value = recipes.lookup(model.config, field)
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


def _has(config, field):
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
        # A count stays one.
        value = max(1, round(value)) if isinstance(old, int) else value
    config[key] = value


def _warmup_field(config):
    """The scheduler's number of updates in which the learning rate rises, or None."""
    scheduler = recipes.lookup(config, "lr_scheduler")
    fields = scheduler if isinstance(scheduler, dict) else {}
    return next((key for key in ("warmup_updates", "warmup_steps") if key in fields), None)


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


class Tuning:
    """All trials of a comparison.

    Args:
        args: options of ``fairseq-sha compare``, after ``runner.load``
        models (list of Recipe): as they were given

    Raises:
        UserError: optuna is missing, the space file is wrong, or the folder has trials of other
            settings
    """

    def __init__(self, args, models):
        try:
            import optuna
        except ImportError:
            raise UserError("--space needs Optuna; pip install 'fairseq-sha[tuning]'")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.args = args
        self.models = {model.name: model for model in models}
        self.space = Space.load(args.space)
        self.folder = args.tuning or args.out / "tuning"
        self.budget = runs.budget_of(args, "trial_") or args.budget
        for setting in self.space.settings:
            if not any(_has(model.config, f) for model in models for f in setting.fields):
                raise UserError(
                    f"{args.space}: no config has a field of {setting.name}: "
                    f"{', '.join(setting.fields)}; correct it"
                )
        if SEED in (*args.seeds, *args.paper_seeds):
            raise UserError(f"--seeds {SEED}: is the seed of all trials; choose others")
        self.settings = self._settings()
        for model in models:
            path = self.folder / model.name / "settings.json"
            changes = runs.changed(path.parent, self.settings[model.name])
            if changes:
                raise UserError(
                    f"{path.parent} has trials of another {', '.join(changes.values())}; choose "
                    "another --tuning, or remove it"
                )
        self.guard = threading.Lock()
        self.storage, self.studies = None, {}

    def __str__(self):
        return (
            f"# {self.args.trials} trials and the recipe for each of {len(self.models)} models, "
            f"{self.budget} each, in {self.folder}"
        )

    def _settings(self):
        """What must be the same for all trials, by model."""
        space = self.space.as_dict()
        out = {}
        for model in self.models.values():
            config = {key: value for key, value in model.config.items() if key != "hydra"}
            own = space["own"].get(recipes.lookup(config, "model._name"))
            out[model.name] = {
                "budget": str(self.budget),
                "eval_streams": self.args.eval_streams,
                "space": {**space, "own": own},
                "config": config,
                "evaluation": model.evaluation,
            }
        return json.loads(json.dumps(out))

    def run(self):
        """Do all trials that are not done yet; other processes may do some of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for model in self.models.values():
            (self.folder / model.name).mkdir(exist_ok=True)
            runs.write_json(self.folder / model.name / "settings.json", self.settings[model.name])
        points = self.points()
        while points:
            self.measure_speeds(points)
            self.args.processes.run([self.work] * self.args.parallel)
            self.wait_for_others()
            points = self.widened()
        self.write_chosen()

    def points(self):
        """All trials as points (None is the recipe). Those that are new are enqueued."""
        with self.locked():
            widenings = json.loads(read(self.folder / "widenings.json") or "[]")
            if widenings and widenings[0]["after"] != self.args.trials:
                raise UserError(
                    f"{self.folder}: the space was widened after {widenings[0]['after']} trials; "
                    "keep that number, or choose another --tuning"
                )
            more = sum(widening["trials"] for widening in widenings)
            points = sobol(self.space, self.args.trials + more)
            position, octaves = self.args.trials, {}
            settings = {setting.name: setting for setting in self.space.settings}
            for widening in widenings:
                name, side = widening["setting"], widening["side"]
                low, high = settings[name].values
                octave = math.log(OCTAVE) / math.log(high / low)
                reached = octaves.get((name, side), 0)
                octaves[name, side] = reached + 1
                for point in points[position : position + widening["trials"]]:
                    beyond = (reached + point[name]) * octave
                    point[name] = 1 + beyond if side > 0 else -beyond
                position += widening["trials"]
            points = [None, *points]
            for name in self.models:
                self.enqueue(name, points)
        return points

    def enqueue(self, name, points):
        """Add trials to the study of a model, after those that it has."""
        import optuna

        study, model = self.study(name), self.models[name]
        for point in points[len(study.get_trials(deepcopy=False)) :]:
            values = self.trial(name, point)[1]
            distributions = self.space.distributions(model)
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    params={} if point is None else values,
                    distributions={}
                    if point is None
                    else {key: distributions[key] for key in values},
                    user_attrs={"point": point, "settings": values},
                )
            )

    def trial(self, name, point):
        """A model's recipe at a point (None: as it was given), and the value of each setting."""
        model = self.models[name]
        if point is None:
            return model, self.space.values(model)
        return self.space.apply(model, point)

    def study(self, name):
        """The Optuna study of a model."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        if self.storage is None:
            backend = JournalFileBackend(str(self.folder / "optuna.journal"))
            self.storage = optuna.storages.JournalStorage(backend)
        if name not in self.studies:
            self.studies[name] = optuna.create_study(
                storage=self.storage, study_name=name, direction="minimize", load_if_exists=True
            )
        return self.studies[name]

    @contextlib.contextmanager
    def locked(self):
        """Alone among all threads and processes."""
        with self.guard, open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def measure_speeds(self, points):
        """Measure the speed of each model at each point, if the budget needs it, one after the
        other."""
        for name in self.models:
            for point in points:
                model, values = self.trial(name, point)
                with contextlib.suppress(RunFailed):  # the trial will say so
                    self.updates(model, values)

    def updates(self, model, values):
        """How many updates a trial has; RunFailed."""
        folder = self.folder / model.name / f"speed-{self.space.speed_key(model, values)}"
        folder.mkdir(exist_ok=True)
        write_recipe(folder, model)
        return runs.updates_of(self.args, self.budget, model, folder)

    def work(self):
        """Do trials until all are taken. The first trials of all models come first."""
        while not self.args.processes.stopping.is_set():
            claimed = self.claim()
            if claimed is None:
                return
            name, trial, lock = claimed
            with lock:
                self.run_trial(name, trial)

    def claim(self):
        """Take a trial that waits, or one that another process began and left. Returns the name of
        its model, the trial, and an open file that locks it; None if there is none."""
        import optuna

        with self.locked():
            open_states = (optuna.trial.TrialState.WAITING, optuna.trial.TrialState.RUNNING)
            candidates = [
                (trial.number, name)
                for name in self.models
                for trial in self.study(name).get_trials(deepcopy=False, states=open_states)
            ]
            for number, name in sorted(candidates):
                folder = self.folder / name / f"trial{number}"
                folder.mkdir(exist_ok=True)
                lock = open(folder / "lock", "w")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                study = self.study(name)
                trial = study.get_trials(deepcopy=False)[number]
                if trial.state == optuna.trial.TrialState.WAITING:
                    self.storage.set_trial_state_values(
                        trial._trial_id, optuna.trial.TrialState.RUNNING
                    )
                return name, number, lock
        return None

    def run_trial(self, name, number):
        """Train and evaluate one trial and tell Optuna. A failed trial is a trial."""
        import optuna

        study = self.study(name)
        frozen = study.get_trials(deepcopy=False)[number]
        model, values = self.trial(name, frozen.user_attrs["point"])
        folder = self.folder / name / f"trial{number}"
        write_recipe(folder, model)
        title = f"{name}, trial {number}"
        try:
            updates = self.updates(model, values)
            result = runs.train_and_evaluate(
                self.args, model, folder, SEED, updates, title, splits=("valid",)
            )
            bits = result["valid"]["bits"]
            failure = None if math.isfinite(bits) else "diverged"
            shutil.rmtree(folder / f"seed{SEED}" / "checkpoints", ignore_errors=True)
        except RunFailed as error:
            print(f"{title} {error}", flush=True)
            failure, result = str(error).splitlines()[0], None
        with self.locked():
            storage, trial_id = self.storage, frozen._trial_id
            if result is not None:
                facts = ("updates", "bytes", "training_seconds", "machine", "parameters")
                for key in facts:
                    storage.set_trial_user_attr(trial_id, key, result.get(key))
            if failure is None:
                study.tell(number, bits)
            else:
                storage.set_trial_user_attr(trial_id, "failure", failure)
                study.tell(number, state=optuna.trial.TrialState.FAIL)

    def wait_for_others(self):
        """Return when no trial of another process runs any more."""
        while self.unfinished():
            if self.args.processes.stopping.wait(5):
                raise KeyboardInterrupt
            self.work()

    def unfinished(self):
        """How many trials are not finished."""
        return sum(
            not trial.state.is_finished()
            for name in self.models
            for trial in self.study(name).get_trials(deepcopy=False)
        )

    def trials(self, name):
        """The trials of a model, as results have them; ``bits`` is null if one failed."""
        out = []
        for trial in self.study(name).get_trials(deepcopy=False):
            if trial.state.is_finished():
                attributes = dict(trial.user_attrs)
                attributes.pop("point")
                bits = trial.value if trial.state.name == "COMPLETE" else None
                out.append({"trial": trial.number, "bits": bits, **attributes})
        return out

    def best(self, name):
        """The best trial of a model on valid, as in :meth:`trials`; None if all failed."""
        done = [trial for trial in self.trials(name) if trial["bits"] is not None]
        return min(done, key=lambda trial: trial["bits"], default=None)

    def borders(self, name):
        """Names of widening settings whose best value is the lowest or the highest that was tried,
        with -1 or 1."""
        best, out = self.best(name), {}
        if best is None:
            return out
        for setting in self.space.of(self.models[name]).values():
            if setting.widen and setting.name in best["settings"]:
                value = best["settings"][setting.name]
                tried = [trial["settings"][setting.name] for trial in self.trials(name)]
                if value in (min(tried), max(tried)):
                    out[setting.name] = -1 if value == min(tried) else 1
        return out

    def widened(self):
        """If the best trial of a model is at a border, enqueue further trials of all models beyond
        it, by an octave; returns all points then, else None."""
        path = self.folder / "widenings.json"
        with self.locked():
            done = json.loads(read(path) or "[]")
            if len(done) >= WIDENINGS:
                return None
            borders = [border for name in self.models for border in self.borders(name).items()]
            if not borders:
                return None
            name, side = max(set(borders), key=borders.count)
            more = -(-self.args.trials // 4)
            after = self.args.trials
            done.append({"setting": name, "side": side, "trials": more, "after": after})
            runs.write_json(path, done)
        print(f"the best {name} of a model is at the border: {more} more trials of all", flush=True)
        return self.points()

    def results(self):
        """What results.json says of the tuning."""
        models = {}
        for name in self.models:
            best = self.best(name)
            models[name] = {
                "trials": self.trials(name),
                "chosen": None if best is None else best["trial"],
                "on_border": sorted(self.borders(name)),
            }
        space = self.space.as_dict()
        return {"space": space, "budget": str(self.budget), "models": models}

    def chosen(self):
        """The best recipe of each model; models of which all trials failed are left out."""
        out = []
        for name in self.models:
            best = self.best(name)
            if best is not None:
                point = self.study(name).get_trials(deepcopy=False)[best["trial"]].user_attrs
                out.append(self.trial(name, point["point"])[0]._replace(variant="tuned"))
        return out

    def write_chosen(self):
        """Write the best recipe of each model as a config, and report the trials."""
        folder = self.folder / "chosen"
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        for model in self.chosen():
            write_recipe(folder, model, f"{model.name}.yaml")
            if model.evaluation:
                path = folder / "evaluation" / f"{model.name}.yaml"
                write_atomically(path, yaml.safe_dump(model.evaluation, sort_keys=False))
        for name in self.models:
            best = self.best(name)
            if best is None:
                print(f"{name}: all trials failed", flush=True)
            else:
                print(f"{name}: trial {best['trial']}: {best['bits']:.3f} bits per byte on valid")


def write_recipe(folder, model, name="recipe.yaml"):
    """Write a config as fairseq-hydra-train reads it."""
    text = yaml.safe_dump(recipes.runnable(model.config), sort_keys=False)
    if read(folder / name) != text:
        write_atomically(folder / name, text)
