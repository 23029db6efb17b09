"""Runs a comparison: tunes, calibrates, trains, evaluates, reports (``commands/compare.py``)."""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from fairseq_sha import signals
from fairseq_sha.compare import DEFAULT_TRIALS, compressors, summary, texts, tuning
from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare.logs import read
from fairseq_sha.compare.processes import Processes, RunFailed
from fairseq_sha.compare.runs import (
    BUDGETS,
    SPLITS,
    budget_of,
    changed,
    is_trained,
    known_updates,
    measure_speeds,
    sizes,
    train_and_evaluate,
    updates_of,
    write_json,
)
from fairseq_sha.compare.space import RELATIVE, WARMUP, WARMUP_FIELDS
from fairseq_sha.errors import UserError
from fairseq_sha.files import locked, try_lock, write_atomically

DIVERGED = "gradients are Nan/Inf"  # fairseq's message when it gives up
#: Folders of a comparison with tuning that are not models.
RESERVED = ("paper", "tuning", "chosen")


def run(args):
    """Compare as the options of ``fairseq-sha compare`` say; returns the exit status."""
    signals.handle(signal.default_int_handler)
    try:
        return compare(args)
    except KeyboardInterrupt:
        print("stopped; repeat the command to continue", file=sys.stderr)
        return 130


def compare(args):
    """Do what is not done yet; returns the exit status."""
    models = load(args)
    tuned = None
    if args.space:
        tuned = tuning.Tuning(args, models)
        check_varied(args, tuned.space)
        if args.dry_run:
            print(tuned)
        else:
            tuned.run()
        if not args.seeds or args.dry_run:
            return 0
        paper = [model._replace(variant="paper") for model in models]
        models = [*tuned.chosen(), *(paper if args.paper_seeds else [])]
        if not models:
            raise UserError(f"all trials of all models failed; see their logs in {tuned.folder}")
    settings = check_settings(args, models)
    if args.dry_run:
        print_commands(args, models)
        return 0
    failures = []
    updates = {}
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out / "lock"):  # other processes may do some of the runs
        settings = check_settings(args, models)
        for model in models:
            prepare(args.out / model.folder, model, settings[model.folder])
        cases = [(model, args.out / model.folder) for model in models]
        # Runs side by side do not tell the speed.
        measure_speeds(args, args.budget, cases, for_times=args.parallel > 1)
    for model in models:
        try:
            updates[model.folder] = updates_of(args.budget, model, args.out / model.folder)
        except RunFailed as error:
            print(f"{model.title} {error}", flush=True)
            failures.append(f"{model.title} (calibration)")
    if args.launcher:
        for model in models:
            try:
                if model.folder in updates:
                    multirun(args, model, updates[model.folder])
            except RunFailed as error:
                print(f"{model.title} {error}", flush=True)
    runs = [(model, seed) for model in models for seed in seeds_of(args, model)]
    # The first seed of all models comes first, so that an unfinished comparison has all models.
    runs.sort(key=lambda run: seeds_of(args, run[0]).index(run[1]))
    elsewhere = []

    def job(number, model, seed, wait=False):
        title = f"[{number}/{len(runs)}] {model.title}, seed {seed}"
        folder = args.out / model.folder
        (folder / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(folder / f"seed{seed}" / "lock")) is None:
            if not wait:
                elsewhere.append((number, model, seed))
                return
            if args.processes.stopping.wait(5):
                return
        with lock:
            if not read(folder / "settings.json") or changed(folder, settings[model.folder]):
                raise UserError(
                    f"{folder}: another command gave it other settings; stop one of them, and "
                    "choose another --out"
                )
            known = (folder / f"seed{seed}" / "result.json").is_file()
            try:
                train_and_evaluate(args, model, folder, seed, updates[model.folder], title)
                if not known:
                    with locked(args.out / "lock"):
                        report(args, runs, settings, tuned)
            except RunFailed as error:
                print(f"{title} {error}", flush=True)
                failures.append(f"{model.title}, seed {seed}")

    args.processes.run(
        functools.partial(job, number, model, seed)
        for number, (model, seed) in enumerate(runs, 1)
        if model.folder in updates
    )
    # What another process was doing is awaited at the end, and done here if that process failed.
    args.processes.run([functools.partial(job, *run, wait=True) for run in elsewhere])
    compressed = rivals(args, runs)
    with locked(args.out / "lock"):
        drawn = report(args, runs, settings, tuned, compressed)
    print(read(args.out / "table.md"))
    if not drawn:
        print("no pictures: matplotlib is missing; pip install 'fairseq-sha[plots]' and repeat")
    if failures:
        print(f"failed: {'; '.join(failures)}; repeat the command to try again", file=sys.stderr)
    return 1 if failures else 0


def seeds_of(args, model):
    """The seeds that a model is trained with."""
    return args.paper_seeds if model.variant == "paper" else args.seeds


def load(args):
    """Check the options and read the configs; UserError."""
    numbers = ["calibration_seconds", "calibration_rounds", "eval_streams", "parallel", "trials"]
    numbers += [prefix + kind for prefix in ("", "trial_") for kind in BUDGETS]
    for option in numbers:
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} {value:g}: must be positive")
    for change in args.set:
        if not re.match(r"\w+\.\S+=", change):
            raise UserError(f"--set {change}: give SECTION.FIELD=VALUE, such as common.cpu=true")
    if not (recipes.TOOLS / "fairseq-hydra-train").is_file():
        raise UserError(f"{recipes.TOOLS} has no fairseq-hydra-train; use the Python beside it")
    args.data, args.out = args.data and from_here(args.data), from_here(args.out)
    args.seeds = list(dict.fromkeys(args.seeds))
    if not args.seeds and not args.space:
        raise UserError("--seeds: name at least one, or tune with --space")
    if not args.seeds and args.paper_seeds:
        given = " ".join(map(str, args.paper_seeds))
        raise UserError(f"--paper-seeds {given}: needs --seeds, which are trained beside them")
    if args.space:
        args.trials = args.trials or DEFAULT_TRIALS
        args.paper_seeds = list(
            dict.fromkeys(args.seeds if args.paper_seeds is None else args.paper_seeds)
        )
    for option in ("trials", "tuning", "paper_seeds", *(f"trial_{kind}" for kind in BUDGETS)):
        if not args.space and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: belongs to tuning; add --space")
    args.budget = budget_of(args)
    if args.rivals != ["none"]:
        compressors.chosen(args.rivals)
    threads = max(1, len(os.sched_getaffinity(0)) // args.parallel) if args.parallel > 1 else None
    args.processes = Processes(args.parallel, threads)
    if args.device is not None:
        check_device(args.device)
        args.set = [*args.set, f"common.cpu={str(args.device == 'cpu').lower()}"]
    if args.launcher and args.space:
        raise UserError(
            "--space with --launcher: trials run on this machine; tune without a launcher, or "
            "start the same command on several machines that share --out"
        )
    if args.launcher and args.seconds:
        raise UserError(
            "--seconds with --launcher: the speed would be measured on this machine and not where "
            "the jobs run; give --updates or --bytes"
        )
    models = {}
    variants = recipes.grid(args.vary) or {"": []}
    for path, (variant, changes) in itertools.product(args.configs, variants.items()):
        model = recipes.load(path, args.data, [*args.set, *changes], args.recipe)
        if variant:
            model = model._replace(name=f"{model.name}-{variant}")
        if args.space and model.name in RESERVED:
            raise UserError(f"{path}: a folder of --space is called {model.name} too; rename it")
        if model.name in models:
            raise UserError(f"{path}: another config is called {model.name} too; rename one")
        check_data(Path(model.config["task"]["data"]))
        if args.bytes:
            recipes.tokens_per_update(model)
        if args.bytes and args.launcher and not recipes.is_of_bytes(model):
            raise UserError(
                f"--bytes with --launcher: how many bytes a token of {path} stands for would be "
                "measured on this machine; give --updates"
            )
        models[model.name] = model
    return list(models.values())


def check_varied(args, space):
    """UserError if tuning would replace what ``--vary`` sets."""
    varied = {change.split("=")[0] for change in itertools.chain(*recipes.grid(args.vary).values())}
    for setting in (*space.settings, *space.own.values()):
        fields = {*setting.fields, *(WARMUP_FIELDS if WARMUP in setting.fields else ())}
        both = varied & fields
        if both and setting.kind not in RELATIVE:
            raise UserError(
                f"--vary {min(both)}: {args.space} gives it other values in each trial; remove it "
                "from one of them"
            )


def check_device(device):
    """UserError if training would not run on the device."""
    if device == "cpu":
        return
    test = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", test]).returncode != 0:
        raise UserError(f"--device {device}: torch sees no GPU here; choose --device cpu")


def check_data(folder):
    """UserError if something is missing of a data folder."""
    for name in ("dict.txt", *(f"{s}.{end}" for s in ("train", *SPLITS) for end in ("bin", "idx"))):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing; make a data folder with a script in preprocess/"
            )


def from_here(path):
    """The path relative to the current directory, where the commands run, if it is inside."""
    path = path.resolve()
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def check_settings(args, models):
    """The settings that must be the same for all results in a model's folder, by model.

    UserError: the folder has results of other settings. Models and seeds may be added.
    """
    common = {"budget": str(args.budget), "eval_streams": args.eval_streams}
    settings = {}
    for model in models:
        config = {key: value for key, value in model.config.items() if key != "hydra"}
        content = {**common, "data": str(Path(config["task"]["data"])), "size": sizes(config)}
        content["config"] = config
        content["evaluation"] = model.evaluation
        settings[model.folder] = json.loads(json.dumps(content))
        folder = args.out / model.folder
        changes = changed(folder, settings[model.folder])
        scored = [*folder.glob("seed*/result.json")]
        if not scored:  # no result depends on settings of evaluation yet
            changes = {key: text for key, text in changes.items() if not is_evaluation(key)}
        if changes and (scored or [*folder.glob("seed*/checkpoints/checkpoint*.pt")]):
            raise UserError(
                f"{folder} has results of another {', '.join(changes.values())}; choose another "
                "--out, or remove it"
            )
    return settings


def is_evaluation(key):
    """Whether a setting affects evaluation only."""
    return key == "eval_streams" or key.startswith("evaluation.")


def prepare(folder, model, settings):
    """Make a model's folder. Logs that other settings left there are removed; UserError if a
    command still works there."""
    changes = changed(folder, settings)
    if changes:
        check_unused(folder)
    if not all(map(is_evaluation, changes)):
        shutil.rmtree(folder)
    elif changes:
        for split in SPLITS:
            for path in [*folder.glob(f"seed*/{split}.log"), *folder.glob(f"seed*/{split}.json")]:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    config = recipes.runnable(model.config)
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "settings.json", settings)


def check_unused(folder):
    """UserError if a run in a model's folder goes on, maybe without the command that began it."""
    for path in [*folder.glob("seed*/lock"), *folder.glob("*.log"), *folder.glob("seed*/*.log")]:
        lock = try_lock(path)
        if lock is None:
            raise UserError(
                f"{folder}: a run with other settings goes on there; stop it, or choose another "
                "--out"
            )
        lock.close()


def print_commands(args, models):
    """Print what would be run."""
    print(f"cd {shlex.quote(str(Path.cwd()))}")
    for model in models:
        folder = args.out / model.folder
        print(f"# {folder}/recipe.yaml: the config with the settings that all models share")
        updates = known_updates(args.budget, model, folder)
        if updates is None:
            unit = "updates per second" if args.seconds else "updates per byte"
            rounds = args.calibration_rounds
            print(f"# UPDATES is the budget times the {unit} of this command, fastest of {rounds}:")
            print(shlex.join(recipes.calibration_command(folder, args.calibration_seconds)))
        if args.launcher:
            print(shlex.join(multirun_command(args, model, args.seeds, updates)))
        for seed in seeds_of(args, model):
            seed_folder = folder / f"seed{seed}"
            if not args.launcher:
                print(shlex.join(recipes.train_command(model, folder, seed_folder, seed, updates)))
            for split in SPLITS:
                command = recipes.eval_command(model, seed_folder, split, args.eval_streams)
                print(shlex.join(command))


def multirun_command(args, model, seeds, updates):
    folder = args.out / model.folder
    return recipes.multirun_command(model, folder, seeds, updates, args.launcher)


def multirun(args, model, updates):
    """Train the seeds that are not trained yet with Hydra's launcher; RunFailed."""
    folder = args.out / model.folder

    def untrained():
        texts = {seed: read(folder / f"seed{seed}" / "train.log") for seed in args.seeds}
        return [seed for seed, text in texts.items() if not is_trained(text)]

    seeds = untrained()
    if seeds:
        args.processes.execute(
            multirun_command(args, model, seeds, updates),
            folder / "multirun.log",
            f"{model.title}, {len(seeds)} seeds",
            lambda: f"training with {args.launcher}",
            lambda _: not untrained(),
        )


def finished(args, runs):
    """The results so far, and the names of the runs that have none."""
    results, missing = [], []
    for model, seed in runs:
        path = args.out / model.folder / f"seed{seed}" / "result.json"
        if path.is_file():
            result = json.loads(read(path))
            # A comparison without tuning may have left a run of the same settings.
            result.pop("recipe", None)
            results.append({**result, **({"recipe": model.variant} if model.variant else {})})
        else:
            last_attempt = read(path.with_name("train.log")).rpartition("\ntraining on ")[2]
            diverged = DIVERGED in last_attempt
            missing.append(f"{model.title} seed {seed}{' (diverged)' if diverged else ''}")
    return results, missing


def rivals(args, runs):
    """Classical compressors on the same text: alone, primed with as many bytes of train as the best
    model has read, and with all of train."""
    if args.rivals == ["none"]:
        return []
    results, _ = finished(args, runs)
    folder = Path(runs[0][0].config["task"]["data"])
    try:
        train, test = (texts.read_text(folder, split) for split in ("train", "test"))
    except UserError as error:
        print(f"no compressors beside the models: {error}")
        return []
    absent = compressors.missing(args.rivals)
    if absent:
        print(absent)
    best = min(results, key=lambda run: summary.by_bits(run["test"]["bits"]), default=None)
    seen, streams = [], 1
    if best is not None:
        seen = [best["bytes"]]
        model = next(
            model
            for model, _ in runs
            if (model.name, model.variant or None) == (best["model"], best.get("recipe"))
        )
        streams = recipes.lookup(model.config, "dataset.batch_size", 1)
    with locked(args.out / "rivals.lock"):  # another process may measure them
        return compressors.rows(
            train,
            test,
            primed_with=[0, *seen, len(train)],
            cache=args.out / "rivals.json",
            only=args.rivals,
            streams=streams,
            progress=lambda line: print(line, flush=True),
        )


def report(args, runs, settings, tuned, rivals=()):
    """Write the results so far; returns whether pictures could be drawn."""
    results, missing = finished(args, runs)
    contents = list(settings.values())
    common = {
        key: value
        for key, value in contents[0].items()
        if key not in ("config", "evaluation") and all(c[key] == value for c in contents)
    }
    if "data" not in common:
        common["data"] = {name: content["data"] for name, content in settings.items()}
    everything = {
        "command": shlex.join(["fairseq-sha", *sys.argv[1:]]),
        "settings": common,
        "not_finished": missing,
        **({"tuning": tuned.results()} if tuned else {}),
        **({"rivals": list(rivals)} if rivals else {}),
        "runs": results,
    }
    return summary.write(args.out, everything)
