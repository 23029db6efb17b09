"""Runs a comparison: calibrates, trains, evaluates, reports (see ``commands/compare.py``)."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import yaml

from fairseq_sha.compare import logs, summary
from fairseq_sha.compare import recipe as recipes
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

PROGRESS_SECONDS = 15
LOG_TAIL = 12  # lines
BUDGETS = ("seconds", "updates", "bytes")
SPLITS = ("valid", "test")


class RunFailed(Exception):
    """A command failed; the message says which, and shows the end of its log."""


def run(args):
    """Compare as the options of ``fairseq-sha compare`` say; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return compare(args)
    except KeyboardInterrupt:
        print("stopped; repeat the command to continue", file=sys.stderr)
        return 130


def compare(args):
    """Do what is not done yet; returns the exit status."""
    models = load(args)
    settings = check_settings(args, models)
    if args.dry_run:
        print_commands(args, models)
        return 0
    for model in models:
        prepare(args.out / model.name, model, settings[model.name])

    failures = []
    runs = [(model, seed) for seed in args.seeds for model in models]
    updates = {}
    for model in models:
        try:
            updates[model.name] = updates_of(args, model) or calibrate(args, model)
        except RunFailed as error:
            print(f"{model.name} {error}", flush=True)
            failures.append(f"{model.name} (calibration)")
    if args.launcher:
        for model in models:
            try:
                if model.name in updates:
                    multirun(args, model, updates[model.name])
            except RunFailed as error:
                print(f"{model.name} {error}", flush=True)
    for number, (model, seed) in enumerate(runs, 1):
        if model.name in updates:
            title = f"[{number}/{len(runs)}] {model.name}, seed {seed}"
            try:
                train_and_evaluate(args, model, seed, updates[model.name], title)
                report(args, runs, settings)
            except RunFailed as error:
                print(f"{title} {error}", flush=True)
                failures.append(f"{model.name}, seed {seed}")
    drawn = report(args, runs, settings)
    print(read(args.out / "table.md"))
    if not drawn:
        print("no pictures: matplotlib is missing; pip install 'fairseq-sha[plots]' and repeat")
    if failures:
        print(f"failed: {'; '.join(failures)}; repeat the command to try again", file=sys.stderr)
    return 1 if failures else 0


def load(args):
    """Check the options and read the configs; UserError."""
    for option in (*BUDGETS, "calibration_seconds", "eval_streams"):
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
    if args.launcher and args.seconds:
        raise UserError(
            "--seconds with --launcher: the speed would be measured on this machine and not where "
            "the jobs run; give --updates or --bytes"
        )
    models = {}
    for path in args.configs:
        model = recipes.load(path, args.data, args.set)
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
    kind = next(kind for kind in BUDGETS if getattr(args, kind) is not None)
    common = {
        "budget": f"{getattr(args, kind):,.10g} {kind}",
        "eval_streams": args.eval_streams,
    }
    settings = {}
    for model in models:
        config = {key: value for key, value in model.config.items() if key != "hydra"}
        data = Path(config["task"]["data"])
        size = {s: (data / f"{s}.bin").stat().st_size for s in ("train", *SPLITS)}
        content = {**common, "data": str(data), "size": size, "config": config}
        content["evaluation"] = model.evaluation
        settings[model.name] = json.loads(json.dumps(content))
        folder = args.out / model.name
        changes = changed(folder, settings[model.name])
        scored = [*folder.glob("seed*/result.json")]
        if not scored:  # no result depends on settings of evaluation yet
            changes = {key: text for key, text in changes.items() if not is_evaluation(key)}
        if changes and (scored or [*folder.glob("seed*/checkpoints/*.pt")]):
            raise UserError(
                f"{folder} has results of another {', '.join(changes.values())}; choose another "
                "--out, or remove it"
            )
    return settings


def changed(folder, settings):
    """How settings differ from those that a model's folder was made with: descriptions, by key."""
    made_with = read(folder / "settings.json")
    if not made_with:
        return {}
    old, new = flat(json.loads(made_with)), flat(settings)
    return {
        key: f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    }


def is_evaluation(key):
    """Whether a setting affects evaluation only."""
    return key == "eval_streams" or key.startswith("evaluation.")


def prepare(folder, model, settings):
    """Make a model's folder. Logs that other settings left there are removed."""
    changes = changed(folder, settings)
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


def flat(content, prefix=""):
    """Nested dicts as one dict, with keys such as ``config.optimization.lr``."""
    out = {}
    for key, value in content.items():
        nested = isinstance(value, dict)
        out.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return out


def write_json(path, content):
    write_atomically(path, summary.compact(content) + "\n")


def print_commands(args, models):
    """Print what would be run."""
    print(f"cd {shlex.quote(str(Path.cwd()))}")
    for model in models:
        folder = args.out / model.name
        print(f"# {folder}/recipe.yaml: the config with the settings that all models share")
        updates = updates_of(args, model)
        if updates is None:
            unit = "updates per second" if args.seconds else "updates per byte"
            print(f"# UPDATES is the budget times the {unit} of this command:")
            print(shlex.join(recipes.calibration_command(folder, args.calibration_seconds)))
        if args.launcher:
            print(shlex.join(multirun_command(args, model, args.seeds, updates)))
        for seed in args.seeds:
            seed_folder = folder / f"seed{seed}"
            if not args.launcher:
                print(shlex.join(recipes.train_command(model, folder, seed_folder, seed, updates)))
            for split in SPLITS:
                command = recipes.eval_command(model, seed_folder, split, args.eval_streams)
                print(shlex.join(command))


def updates_of(args, model):
    """The number of updates that a model's budget allows, at least 1; None if that depends on what
    was not measured yet: its speed, or how many bytes its tokens stand for."""
    if args.updates:
        return args.updates
    if args.bytes and recipes.is_of_bytes(model):
        return max(1, round(args.bytes / recipes.tokens_per_update(model)))
    speed = read(args.out / model.name / "speed.json")
    return json.loads(speed)["updates"] if speed else None


def multirun_command(args, model, seeds, updates):
    folder = args.out / model.name
    return recipes.multirun_command(model, folder, seeds, updates, args.launcher)


def multirun(args, model, updates):
    """Train the seeds that are not trained yet with Hydra's launcher; RunFailed."""
    folder = args.out / model.name

    def untrained():
        texts = {seed: read(folder / f"seed{seed}" / "train.log") for seed in args.seeds}
        return [seed for seed, text in texts.items() if not is_trained(text)]

    seeds = untrained()
    if seeds:
        execute(
            multirun_command(args, model, seeds, updates),
            folder / "multirun.log",
            f"{model.name}, {len(seeds)} seeds",
            lambda: f"training with {args.launcher}",
            lambda _: not untrained(),
        )


def calibrate(args, model):
    """Train a model for a short time, write its speed to speed.json, and return the number of
    updates that the budget allows. RunFailed."""
    folder = args.out / model.name
    log = folder / "calibration.log"
    if log.exists():
        log.unlink()
    command = recipes.calibration_command(folder, args.calibration_seconds)
    execute(command, log, model.name, lambda: "measuring the speed", is_trained)
    training = logs.read_training(read(log))
    if training is None or training.train[-1][0] < logs.SETTLING + recipes.CALIBRATION_INTERVAL:
        raise RunFailed(
            f"is too slow to be measured in {args.calibration_seconds:g} s; raise "
            "--calibration-seconds"
        )
    if args.seconds:
        updates = int(args.seconds / training.seconds_per_update)
    else:
        updates = round(args.bytes / recipes.tokens_per_update(model) / training.bytes_per_token)
    speed = {
        "updates_per_second": 1 / training.seconds_per_update,
        "tokens_per_update": training.tokens_per_update,
        "bytes_per_token": training.bytes_per_token,
        "measured_updates": training.train[-1][0],
        "updates": max(1, updates),
    }
    write_json(folder / "speed.json", speed)
    return speed["updates"]


def train_and_evaluate(args, model, seed, updates, title):
    """Do one run, as far as it is not done yet; RunFailed."""
    model_folder = args.out / model.name
    folder = model_folder / f"seed{seed}"
    if (folder / "result.json").is_file():
        print(f"{title}: already finished", flush=True)
        return
    folder.mkdir(exist_ok=True)
    log = folder / "train.log"

    def status():
        training = logs.read_training(read(log))
        if training is None:
            return "starting"
        update, bits = training.train[-1]
        return f"update {update:,} of {updates:,}, {bits:.2f} bits per byte"

    if not is_trained(read(log)) and args.launcher:
        raise RunFailed(f"was not trained; see {model_folder / 'multirun.log'}")
    if not is_trained(read(log)):
        command = recipes.train_command(model, model_folder, folder, seed, updates)
        execute(command, log, title, status, is_trained)
    for split in SPLITS:
        if evaluation_of(folder, model, split) is None:
            execute(
                recipes.eval_command(model, folder, split, args.eval_streams),
                folder / f"{split}.log",
                title,
                f"evaluating on {split}".format,
                lambda _, split=split: evaluation_of(folder, model, split),
            )
    result = result_of(folder, model, seed, updates)
    # The machine of a launcher's jobs is not known.
    result["machine"] = None if args.launcher else machine()
    write_json(folder / "result.json", result)
    for path in (folder / "checkpoints").glob("*.pt"):
        if path.name != "checkpoint_last.pt":
            path.unlink()
    valid, test = (result[split]["bits"] for split in SPLITS)
    print(f"{title}: {valid:.3f} bits per byte on valid, {test:.3f} on test", flush=True)


def evaluation_of(folder, model, split):
    """The score of a run's model on a split, as in a result; None if it is not there yet."""
    if recipes.is_ours(model.config):
        return logs.read_evaluation(folder / f"{split}.json")
    return logs.read_eval_lm(read(folder / f"{split}.log"))


def is_trained(text):
    """Whether a log says that training is complete."""
    # The second line is that of a run that was stopped between its last checkpoint and its end.
    return "done training in" in text or "nothing left to train" in text


def read(path):
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def execute(command, log, title, status, is_done):
    """Run a command, append its output to a log, and print its progress from time to time.

    status: function that returns the progress as text
    is_done: function that tells from the log's text whether the command did its work
    RunFailed: it did not, or exited with an error
    """
    started = printed = time.monotonic()
    print(f"{title}: {status()}", flush=True)
    with open(log, "ab") as out:
        # In a session of its own, so that all of its processes can be stopped together.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        stopped = None
        while True:
            try:
                pid, code, usage = os.wait4(child.pid, 0 if stopped else os.WNOHANG)
                if pid:
                    break
                time.sleep(0.1)
                if time.monotonic() - printed >= PROGRESS_SECONDS:
                    printed = time.monotonic()
                    print(f"{title}: {status()}, {printed - started:.0f} s", flush=True)
            except KeyboardInterrupt as error:
                stopped = error
                os.killpg(child.pid, signal.SIGTERM)
        child.returncode = os.WEXITSTATUS(code) if os.WIFEXITED(code) else -os.WTERMSIG(code)
        # ru_maxrss is in KB. On Linux it is at least that of this process, which is small: it does
        # not import torch.
        ended = f"{logs.ENDED} {child.returncode}, peak memory {usage.ru_maxrss // 1024} MB\n"
        out.write(ended.encode())
    if stopped:
        raise stopped
    if child.returncode != 0 or not is_done(read(log)):
        tail = "\n".join("    " + line[:200] for line in read(log).splitlines()[-LOG_TAIL:])
        raise RunFailed(f"failed; the end of {log}:\n{tail}")


def result_of(folder, model, seed, updates):
    """What a finished run left, as a result; see ``summary``."""
    text = read(folder / "train.log")
    training = logs.read_training(text)
    if "Stopping training due to num_updates" not in text:
        raise RunFailed(
            f"ended after about {training.train[-1][0]:,} of {updates:,} updates: its config has "
            "another condition to stop; remove it and the run's folder"
        )
    tokens, seconds = training.tokens_per_update, training.seconds_per_update

    gpu = re.search(r"^rank .* name = (.+?)\s*$", text, re.MULTILINE)
    return {
        "model": model.name,
        "seed": seed,
        "parameters": logs.read_parameters(text),
        "updates": updates,
        "bytes": round(updates * tokens * training.bytes_per_token),
        "training_seconds": float(f"{updates * seconds:.6g}"),
        "training_tokens_per_second": float(f"{tokens / seconds:.6g}"),
        "peak_memory_mb": logs.read_peak(text),
        "device": gpu.group(1) if gpu else "CPU",
        **{split: evaluation_of(folder, model, split) for split in SPLITS},
        "train_curve": training.train,
        "valid_curve": training.valid,
    }


def report(args, runs, settings):
    """Write the results so far; returns whether pictures could be drawn."""
    results, missing = [], []
    for model, seed in runs:
        path = args.out / model.name / f"seed{seed}" / "result.json"
        if path.is_file():
            results.append(json.loads(read(path)))
        else:
            missing.append(f"{model.name} seed {seed}")
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
        "runs": results,
    }
    return summary.write(args.out, everything)


def machine():
    """The processor and the versions that a run was measured with."""
    names = re.findall(r"^model name\s*:\s*(.+)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    versions = {}
    for name in ("torch", "fairseq", "ve-fairseq", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # fairseq is installed under one of two names
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        **versions,
    }
