"""The tuning stage of a comparison: the same trials for all models, kept by Optuna.

Trial 0 of each model is its recipe, scaled to the budget. The others are points of one scrambled
Sobol sequence in a unit cube, the same for all models; a space file says what each coordinate of
the cube means. Choice is by valid alone. See ``examples/head_to_head/README.md``.
"""

import json
import math
import shutil

import yaml

from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare import runs
from fairseq_sha.compare.logs import read
from fairseq_sha.compare.processes import RunFailed
from fairseq_sha.compare.space import OCTAVE, WIDENINGS, Space, has_field, sobol
from fairseq_sha.errors import UserError
from fairseq_sha.files import locked, try_lock, write_atomically

SEED = 0  # of all trials; the final stage has other seeds


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
            if not any(has_field(model.config, f) for model in models for f in setting.fields):
                raise UserError(
                    f"{args.space}: no config has a field of {setting.name}: "
                    f"{', '.join(setting.fields)}; correct it"
                )
        if SEED in (*args.seeds, *args.paper_seeds):
            raise UserError(f"--seeds {SEED}: is the seed of all trials; choose others")
        self.settings = self._settings()
        self.check_settings()
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
                "size": runs.sizes(config),
                "config": config,
                "evaluation": model.evaluation,
            }
        return json.loads(json.dumps(out))

    def check_settings(self):
        """UserError if the folder has trials of other settings."""
        for name, settings in self.settings.items():
            changes = runs.changed(self.folder / name, settings)
            if changes:
                raise UserError(
                    f"{self.folder / name} has trials of another {', '.join(changes.values())}; "
                    f"choose another --tuning, or remove {self.folder}"
                )

    def run(self):
        """Do all trials that are not done yet; other processes may do some of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self.check_settings()  # again, as another process may have begun
            for name, settings in self.settings.items():
                path = self.folder / name / "settings.json"
                if not path.is_file() and self.study(name).get_trials(deepcopy=False):
                    raise UserError(
                        f"{self.folder} has trials of {name}, and {path} is missing, which says "
                        f"what they are of; remove {self.folder}"
                    )
                path.parent.mkdir(exist_ok=True)
                runs.write_json(path, settings)
            points = self.points()
        while points:
            self.measure_speeds()
            self.args.processes.run([self.work] * self.args.parallel)
            self.wait_for_others()
            points = self.widened()
        self.write_chosen()

    def points(self):
        """All trials as points (None is the recipe). Those that are new are enqueued. For the
        holder of the lock."""
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
        done = len(study.get_trials(deepcopy=False))
        if done > len(points):
            raise UserError(
                f"--trials {self.args.trials}: {self.folder} has {done - 1} trials of {name}; give "
                "that number, so that all models have as many, or choose another --tuning"
            )
        for point in points[done:]:
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

    def locked(self):
        """Alone among all threads and processes, until the end of a ``with`` block."""
        return locked(self.folder / "lock")

    def measure_speeds(self):
        """Measure the speed of each model at each point whose trial is not finished, if the budget
        needs it, while no other process does."""
        with locked(self.folder / "speeds.lock"):
            cases = {}
            for name in self.models:
                for trial in self.study(name).get_trials(deepcopy=False):
                    model, values = self.trial(name, trial.user_attrs["point"])
                    folder = self.speed_folder(model, values)
                    if (folder / "speed.json").is_file():
                        cases[folder] = model
                        continue
                    unknown = runs.known_updates(self.budget, model, folder) is None
                    if unknown and not trial.state.is_finished():
                        folder.mkdir(exist_ok=True)
                        write_recipe(folder, model)
                        cases[folder] = model
            runs.measure_speeds(
                self.args,
                self.budget,
                [(model, folder) for folder, model in cases.items()],
                strict=True,
            )

    def speed_folder(self, model, values):
        """The folder of all trials of a model that have the same speed."""
        return self.folder / model.name / f"speed-{self.space.speed_key(model, values)}"

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
                lock = try_lock(folder / "lock")
                if lock is None:
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
            updates = runs.updates_of(self.budget, model, self.speed_folder(model, values))
            result = runs.train_and_evaluate(
                self.args, model, folder, SEED, updates, title, splits=("valid",), validate=False
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
        it, by an octave; returns all points then, or if another process has done that, else
        None."""
        path = self.folder / "widenings.json"
        with self.locked():
            if self.unfinished():
                return self.points()
            done = json.loads(read(path) or "[]")
            if len(done) >= WIDENINGS:
                return None
            borders = [border for name in self.models for border in self.borders(name).items()]
            if not borders:
                return None
            # Of several with as many models, the first: the same in each process.
            name, side = max(dict.fromkeys(borders), key=borders.count)
            more = -(-self.args.trials // 4)
            after = self.args.trials
            done.append({"setting": name, "side": side, "trials": more, "after": after})
            runs.write_json(path, done)
            points = self.points()
        print(f"the best {name} of a model is at the border: {more} more trials of all", flush=True)
        return points

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
        with self.locked():
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
