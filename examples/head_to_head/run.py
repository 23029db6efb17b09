"""Compare models under one budget: train, evaluate, report.

    python examples/head_to_head/run.py --data data-bin/enwiki6 \\
        --configs examples/head_to_head/*.yaml --seconds 720 --seeds 1 2 --out runs/head_to_head

Each config is a complete YAML for fairseq-hydra-train. Its optimization.max_update is the length
of its own schedule, which is scaled to the budget: all that lr_scheduler counts in updates. A
file of its name in the folder `evaluation` beside it holds settings of evaluation only
(tokens_per_sample, batch_size, context_window, model_overrides).

A budget in seconds of training is turned into updates once, by training each model for a short
while; one in bytes by the mean number of tokens of an update, on one device.

OUT gets table.md, results.json and pictures of learning curves, anew after each run;
OUT/MODEL/seedN gets logs, a checkpoint and result.json. Repeat the command to go on
after an interruption.
"""

import argparse
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

import logs
import recipe as recipes
import summary
import yaml
from recipe import ROOT, UserError
from summary import write, write_json

PROGRESS_SECONDS = 15
LOG_TAIL = 12  # lines
BUDGETS = ("seconds", "updates", "bytes")
SPLITS = ("valid", "test")


class RunFailed(Exception):
    """A command failed; the text says which, and how its log ends."""


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = parse()
    try:
        sys.exit(compare(args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; repeat the command to go on", file=sys.stderr)
        sys.exit(130)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="data folder")
    parser.add_argument("--configs", required=True, nargs="+", type=Path, help="one YAML a model")
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="budget: seconds of training")
    budget.add_argument("--updates", type=int, help="budget: updates")
    budget.add_argument("--bytes", type=int, help="budget: bytes to train on")
    parser.add_argument(
        "--calibration-seconds",
        type=float,
        default=40,
        help="how long each model is trained to learn its speed (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-streams",
        type=int,
        default=8,
        help="batch size of evaluation, unless the config has its own (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change all configs",
    )
    parser.add_argument(
        "--launcher",
        metavar="NAME",
        help="train all seeds of a model by one multirun through this launcher of Hydra's, such as "
        "submitit_slurm; the default trains one after the other, here",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    return parser.parse_args()


def compare(args):
    """Do all that is left to do; returns the exit status."""
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
            failures.append(f"{model.name} (its speed)")
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
                run(args, model, seed, updates[model.name], title)
                report(args, runs, settings)
            except RunFailed as error:
                print(f"{title} {error}", flush=True)
                failures.append(f"{model.name}, seed {seed}")
    drawn = report(args, runs, settings)
    print(read(args.out / "table.md"))
    if not drawn:
        print("no pictures: matplotlib is missing; pip install 'fairseq-sha[plots]', then repeat")
    if failures:
        print(f"failed: {'; '.join(failures)}; repeat the command to try again", file=sys.stderr)
    return 1 if failures else 0


def load(args):
    """Check what was typed and read the configs; UserError names what is wrong."""
    for option in (*BUDGETS, "calibration_seconds", "eval_streams"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} {value:g}: must be positive")
    for change in args.set:
        if not re.match(r"\w+\.\S+=", change):
            raise UserError(f"--set {change}: give SECTION.FIELD=VALUE, such as common.cpu=true")
    for name in ("dict.txt", *(f"{s}.{end}" for s in ("train", *SPLITS) for end in ("bin", "idx"))):
        if not (args.data / name).is_file():
            raise UserError(
                f"{args.data / name} is missing; make a data folder with a script in preprocess/"
            )
    if not (recipes.TOOLS / "fairseq-hydra-train").is_file():
        raise UserError(f"{recipes.TOOLS} has no fairseq-hydra-train; use the Python beside it")
    args.data, args.out = from_root(args.data), from_root(args.out)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.launcher and args.seconds:
        raise UserError(
            "--seconds with --launcher: speed would be measured here, not where the jobs run; give "
            "--updates or --bytes"
        )
    models = {}
    for path in args.configs:
        model = recipes.load(path, args.data, args.set)
        if model.name in models:
            raise UserError(f"{path}: another config is called {model.name} too; rename one")
        if args.bytes:
            recipes.tokens_per_update(model)
        models[model.name] = model
    os.chdir(ROOT)
    return list(models.values())


def from_root(path):
    """The path as commands are given it: they run in the project's root."""
    path = path.resolve()
    try:
        return path.relative_to(ROOT)
    except ValueError:
        return path


def check_settings(args, models):
    """What must stay the same for all results in a model's folder, by model; UserError if it does
    not. Models and seeds may be added."""
    kind = next(kind for kind in BUDGETS if getattr(args, kind) is not None)
    common = {
        "budget": f"{getattr(args, kind):,.10g} {kind}",
        "data": str(args.data),
        "size": {s: (args.data / f"{s}.bin").stat().st_size for s in ("train", *SPLITS)},
        "eval_streams": args.eval_streams,
    }
    settings = {}
    for model in models:
        config = {key: value for key, value in model.config.items() if key != "hydra"}
        content = {**common, "config": config, "evaluation": model.evaluation}
        settings[model.name] = json.loads(json.dumps(content))
        folder = args.out / model.name
        changes = changed(folder, settings[model.name])
        scored = [*folder.glob("seed*/result.json")]
        if not scored:  # then no result depends on settings of evaluation
            changes = {key: text for key, text in changes.items() if not of_evaluation(key)}
        if changes and (scored or [*folder.glob("seed*/checkpoints/*.pt")]):
            raise UserError(
                f"{folder} has results of another {', '.join(changes.values())}; choose another "
                "--out, or remove it"
            )
    return settings


def changed(folder, settings):
    """How settings differ from those that a model's folder was made with, if it was: by key."""
    made_with = read(folder / "settings.json")
    if not made_with:
        return {}
    old, new = flat(json.loads(made_with)), flat(settings)
    return {
        key: f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    }


def of_evaluation(key):
    return key == "eval_streams" or key.startswith("evaluation.")


def prepare(folder, model, settings):
    """Make a model's folder. What other settings left there, logs at most, is removed."""
    changes = changed(folder, settings)
    if not all(map(of_evaluation, changes)):
        shutil.rmtree(folder)
    elif changes:
        for log in [path for split in SPLITS for path in folder.glob(f"seed*/{split}.log")]:
            log.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "recipe.yaml", yaml.safe_dump(model.config, sort_keys=False))
    write_json(folder / "settings.json", settings)


def flat(content, prefix=""):
    """Nested dicts as one, with keys such as ``config.optimization.lr``."""
    out = {}
    for key, value in content.items():
        nested = isinstance(value, dict)
        out.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return out


def print_commands(args, models):
    print(f"cd {shlex.quote(str(ROOT))}")
    for model in models:
        folder = args.out / model.name
        print(f"# {folder}/recipe.yaml: the config with what is the same for all models")
        updates = updates_of(args, model)
        if updates is None:
            print("# UPDATES: the budget times the updates per second of")
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
    """Updates that the budget gives a model, one at least; None if its speed must be known for
    that and was not measured yet."""
    if args.updates:
        return args.updates
    if args.bytes:
        return max(1, round(args.bytes / recipes.tokens_per_update(model)))
    speed = read(args.out / model.name / "speed.json")
    return json.loads(speed)["updates"] if speed else None


def multirun_command(args, model, seeds, updates):
    folder = args.out / model.name
    return recipes.multirun_command(model, folder, seeds, updates, args.launcher)


def multirun(args, model, updates):
    """Train all seeds that are not trained yet through Hydra's launcher; RunFailed."""
    folder = args.out / model.name

    def left():
        folders = {seed: folder / f"seed{seed}" for seed in args.seeds}
        return [seed for seed in folders if not is_trained(read(folders[seed] / "train.log"))]

    if left():
        command = multirun_command(args, model, left(), updates)
        execute(
            command,
            folder / "multirun.log",
            f"{model.name}, {len(left())} seeds",
            lambda: f"training through {args.launcher}",
            lambda _: not left(),
        )


def calibrate(args, model):
    """Train a model for a while to learn its speed, which is written to speed.json; returns the
    updates that the budget gives it. RunFailed."""
    folder = args.out / model.name
    log = folder / "calibration.log"
    if log.exists():
        log.unlink()
    command = recipes.calibration_command(folder, args.calibration_seconds)
    execute(command, log, model.name, lambda: "measuring its speed", is_trained)
    training = logs.read_training(read(log))
    if training is None or training.train[-1][0] < logs.SETTLING + recipes.CALIBRATION_INTERVAL:
        raise RunFailed(
            f"is too slow for {args.calibration_seconds:g} s of measuring; raise "
            "--calibration-seconds"
        )
    speed = {
        "updates_per_second": 1 / training.seconds_per_update,
        "tokens_per_update": training.tokens_per_update,
        "measured_updates": training.train[-1][0],
        "updates": max(1, int(args.seconds / training.seconds_per_update)),
    }
    write_json(folder / "speed.json", speed)
    return speed["updates"]


def run(args, model, seed, updates, title):
    """Train and evaluate, as far as it is not done; RunFailed."""
    model_folder = args.out / model.name
    folder = model_folder / f"seed{seed}"
    if (folder / "result.json").is_file():
        print(f"{title}: finished before", flush=True)
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
        split_log = folder / f"{split}.log"
        if logs.read_evaluation(read(split_log)) is None:
            command = recipes.eval_command(model, folder, split, args.eval_streams)
            execute(
                command, split_log, title, f"evaluating on {split}".format, logs.read_evaluation
            )
    result = result_of(folder, model.name, seed, updates)
    # Jobs of a launcher ran who knows where.
    result["machine"] = None if args.launcher else machine()
    write_json(folder / "result.json", result)
    for path in (folder / "checkpoints").glob("*.pt"):
        if path.name != "checkpoint_last.pt":
            path.unlink()
    valid, test = (result[split]["bits"] for split in SPLITS)
    print(f"{title}: {valid:.3f} bits per byte on valid, {test:.3f} on test", flush=True)


def is_trained(text):
    # The second, where a run was stopped between its last checkpoint and its end.
    return "done training in" in text or "nothing left to train" in text


def read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def execute(command, log, title, status, is_done):
    """Run a command, its output appended to a log, and print a line about it now and then.

    status: gives what that line says
    is_done: tells from the log's text whether the command did its work
    RunFailed: it did not, or exited with an error
    """
    started = printed = time.monotonic()
    print(f"{title}: {status()}", flush=True)
    with open(log, "ab") as out:
        # In a session of its own, so that all of its processes can be stopped, once.
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
        # ru_maxrss is in KB. Linux counts this process's own into it, which is smaller: no torch.
        ended = f"{logs.ENDED} {child.returncode}, peak memory {usage.ru_maxrss // 1024} MB\n"
        out.write(ended.encode())
    if stopped:
        raise stopped
    if child.returncode != 0 or not is_done(read(log)):
        tail = "\n".join("    " + line[:200] for line in read(log).splitlines()[-LOG_TAIL:])
        raise RunFailed(f"failed; the end of {log}:\n{tail}")


def result_of(folder, name, seed, updates):
    """Everything that is to be known about a finished run, from its logs."""
    text = read(folder / "train.log")
    training = logs.read_training(text)
    if "Stopping training due to num_updates" not in text:
        raise RunFailed(
            f"ended after some {training.train[-1][0]:,} of {updates:,} updates: something in its "
            "config stopped it; remove that, and the run's folder"
        )
    tokens, seconds = training.tokens_per_update, training.seconds_per_update

    def curve(points):
        return [
            {"update": u, "bytes": u * tokens, "seconds": u * seconds, "bits": bits}
            for u, bits in points
        ]

    gpu = re.search(r"^rank .* name = (.+?)\s*$", text, re.MULTILINE)
    return {
        "model": name,
        "seed": seed,
        "parameters": logs.read_parameters(text),
        "updates": updates,
        "bytes": round(updates * tokens),
        "training_seconds": updates * seconds,
        "training_tokens_per_second": tokens / seconds,
        "peak_memory_mb": logs.read_peak(text),
        "device": gpu.group(1) if gpu else "CPU",
        **{split: logs.read_evaluation(read(folder / f"{split}.log")) for split in SPLITS},
        "train_curve": curve(training.train),
        "valid_curve": curve(training.valid),
    }


def report(args, runs, settings):
    """Write what is known so far; returns whether there could be pictures."""
    results, missing = [], []
    for model, seed in runs:
        path = args.out / model.name / f"seed{seed}" / "result.json"
        if path.is_file():
            results.append(json.loads(read(path)))
        else:
            missing.append(f"{model.name} seed {seed}")
    common = {
        k: v for k, v in next(iter(settings.values())).items() if k not in ("config", "evaluation")
    }
    rows = summary.summarise(results)
    everything = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": common,
        "not_finished": missing,
        "models": rows,
        "runs": results,
    }
    write_json(args.out / "results.json", everything)
    write(args.out / "table.md", summary.table(rows, common, missing))
    try:
        summary.draw(results, rows, args.out)
    except ImportError:
        return False
    return True


def machine():
    """What a run was measured on and with."""
    names = re.findall(r"^model name\s*:\s*(.+)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    versions = {}
    for name in ("torch", "fairseq", "ve-fairseq", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # fairseq goes by one of two names
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        **versions,
    }


if __name__ == "__main__":
    main()
