"""One run of a comparison: how long it is, what it takes, what it leaves."""

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fairseq_sha.compare import logs
from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare.logs import read
from fairseq_sha.compare.processes import RunFailed
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

BUDGETS = ("seconds", "updates", "bytes")
SPLITS = ("valid", "test")
CALIBRATION_LOG = "calibration.log"
#: How much longer a slow model may be measured.
LONGER = (1, 2, 4, 8)
#: What a machine's speed depends on, of :func:`machine` and the device.
SPEED_DEPENDS_ON = ("cpu", "cpus", "omp_num_threads", "torch", "device")


class NotMeasured(RunFailed):
    """A speed is not measured for a reason that the user can mend."""


class Budget(NamedTuple):
    """How long a model is trained."""

    kind: str  # of BUDGETS
    amount: float

    def __str__(self):
        return f"{self.amount:,.10g} {self.kind}"


def budget_of(args, prefix=""):
    """The budget that was given, or None."""
    for kind in BUDGETS:
        amount = getattr(args, prefix + kind)
        if amount is not None:
            return Budget(kind, amount)
    return None


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


def sizes(config):
    """The size of each split of a config's data, which tells whether the data have changed."""
    data = Path(config["task"]["data"])
    return {split: (data / f"{split}.bin").stat().st_size for split in ("train", *SPLITS)}


def flat(content, prefix=""):
    """Nested dicts as one dict, with keys such as ``config.optimization.lr``."""
    out = {}
    for key, value in content.items():
        nested = isinstance(value, dict)
        out.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return out


def write_json(path, content):
    write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")


def updates_of(budget, model, folder):
    """The number of updates that a model's budget allows, at least 1; RunFailed if that depends on
    a speed that could not be measured."""
    updates = known_updates(budget, model, folder)
    if updates is None:
        raise RunFailed(f"has no speed; see {folder / CALIBRATION_LOG}")
    return updates


def known_updates(budget, model, folder):
    """The number of updates that a model's budget allows; None if that depends on what was not
    measured yet: its speed, or how many bytes its tokens stand for."""
    if budget.kind == "updates":
        return int(budget.amount)
    if budget.kind == "bytes" and recipes.is_of_bytes(model):
        return max(1, round(budget.amount / recipes.tokens_per_update(model)))
    speed = read(folder / "speed.json")
    if not speed:
        return None
    speed = json.loads(speed)
    if budget.kind == "seconds":
        return max(1, int(budget.amount * speed["updates_per_second"]))
    tokens = budget.amount / speed["bytes_per_token"]
    return max(1, round(tokens / recipes.tokens_per_update(model)))


def measure_speeds(args, budget, cases, for_times=False, strict=False):
    """Measure the speeds that are not known yet, in rounds through all models: what slows the
    machine for a while must not slow a few of them only. A failure is printed, and
    :func:`updates_of` fails.

    budget: of the models; if it needs no speed, only ``for_times`` lets one be measured
    cases: pairs of a model and its folder, which has its recipe.yaml if its speed is not known
    strict: whether what the user can mend, :class:`NotMeasured`, is an error

    Raises:
        UserError: the budget is in seconds, and known speeds are of several machines
    """
    folders = [folder for _, folder in cases]
    other = budget.kind == "seconds" and other_machine(folders)
    if other:
        raise UserError(
            f"a budget in seconds needs all speeds from one machine, and {other}; compare models "
            "that have speeds of different machines in different folders"
        )
    missing = [
        case
        for case in cases
        if not (case[1] / "speed.json").is_file()
        and (for_times or known_updates(budget, *case) is None)
    ]
    for number in range(1, args.calibration_rounds + 1):
        for case in list(missing):
            try:
                if budget.kind == "seconds":
                    other = other_machine(folders, machine(args.processes))
                if other:
                    raise NotMeasured(
                        "is not measured here, since a budget in seconds needs all speeds from one "
                        f"machine: {other}; go on there, or compare in another folder"
                    )
                calibrate(args, *case, number)
            except RunFailed as error:
                if strict and isinstance(error, NotMeasured):
                    raise UserError(f"{case[0].title} {error}")
                print(f"{case[0].title} {error}", flush=True)
                missing.remove(case)


def other_machine(folders, here=None):
    """Tells of the first speed that was measured on another machine than the others, or than
    ``here`` if that is given; None if there is none."""
    for folder in folders:
        for path in (folder / "speed.json", *sorted(folder.glob("calibration*.json"))):
            if not path.is_file():
                continue
            speed = json.loads(read(path))
            there = {**speed.get("machine", {}), "device": speed.get("device", "CPU")}
            here = there if here is None else here
            differences = [
                f"{key} {there[key]}, not {here[key]}"
                for key in SPEED_DEPENDS_ON
                if key in there and key in here and there[key] != here[key]
            ]
            if differences:
                return f"{path} is of another machine ({'; '.join(differences)})"
    return None


def calibrate(args, model, folder, number):
    """Train a model for a short time, or a longer one if it is slow, and measure its speed. After
    the last of all rounds, write the fastest to speed.json; RunFailed or NotMeasured.

    number: of the round; nothing is done if it was done before
    """
    path = folder / f"calibration{number}.json"
    if not path.is_file():
        write_json(path, measured_speed(args, model, folder))
    rounds = [folder / f"calibration{n}.json" for n in range(1, args.calibration_rounds + 1)]
    if all(path.is_file() for path in rounds):
        speeds = [json.loads(read(path)) for path in rounds]
        fastest = max(speeds, key=lambda speed: speed["updates_per_second"])
        of_rounds = [speed["updates_per_second"] for speed in speeds]
        write_json(folder / "speed.json", {**fastest, "of_rounds": of_rounds})


def measured_speed(args, model, folder):
    """What ``speed.json`` says, measured once; RunFailed or NotMeasured."""
    log = folder / CALIBRATION_LOG
    for factor in LONGER:
        seconds = factor * args.calibration_seconds
        command = recipes.calibration_command(folder, seconds)
        args.processes.execute(
            command, log, model.title, lambda: "measuring the speed", is_trained, again=True
        )
        training = logs.read_training(read(log))
        least = logs.SETTLING + recipes.CALIBRATION_INTERVAL
        if training is not None and training.train[-1][0] >= least:
            break
    else:
        raise NotMeasured(
            f"is too slow to be measured in {seconds:g} s; raise --calibration-seconds, which is "
            f"{args.calibration_seconds:g}"
        )
    return {
        "updates_per_second": 1 / training.seconds_per_update,
        "tokens_per_update": training.tokens_per_update,
        "bytes_per_token": training.bytes_per_token,
        "measured_updates": training.train[-1][0],
        "device": logs.read_device(read(log)),
        "machine": machine(args.processes),
    }


def train_and_evaluate(
    args, model, model_folder, seed, updates, title, splits=SPLITS, validate=True
):
    """Do one run, as far as it is not done yet, and return its result; RunFailed.

    model_folder: has the model's recipe.yaml, and gets a folder for each seed
    validate: whether there are validations during training, which give the learning curve
    """
    folder = model_folder / f"seed{seed}"
    if (folder / "result.json").is_file():
        print(f"{title}: already finished", flush=True)
        return json.loads(read(folder / "result.json"))
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
        command = recipes.train_command(model, model_folder, folder, seed, updates, validate)
        args.processes.execute(command, log, title, status, is_trained)
    for split in splits:
        if evaluation_of(folder, model, split) is None:
            args.processes.execute(
                recipes.eval_command(model, folder, split, args.eval_streams),
                folder / f"{split}.log",
                title,
                f"evaluating on {split}".format,
                lambda _, split=split: evaluation_of(folder, model, split),
            )
    if "test" in splits and recipes.is_ours(model.config):
        count_flops(args, model_folder, title)
    # The machine of a launcher's jobs is not known.
    here = None if args.launcher else machine(args.processes)
    result = result_of(model_folder, model, seed, updates, splits, here)
    write_json(folder / "result.json", result)
    for path in (folder / "checkpoints").glob("*.pt"):
        if path.name != "checkpoint_last.pt":
            path.unlink()
    scores = ", ".join(f"{result[split]['bits']:.3f} on {split}" for split in splits)
    print(f"{title}: bits per byte: {scores}", flush=True)
    return result


def count_flops(args, model_folder, title):
    """Count the operations of a model once, into flops.json. A model whose operations cannot be
    counted has none in its results."""
    path = model_folder / "flops.json"
    if path.is_file():
        return
    log = model_folder / "flops.log"
    try:
        command = recipes.flops_command(model_folder)
        args.processes.execute(
            command, log, title, "counting FLOPs".format, lambda _: path.exists()
        )
    except RunFailed as error:
        if not path.is_file():  # otherwise another run was faster
            print(f"{title}: FLOPs are not counted: {error}", flush=True)


def evaluation_of(folder, model, split):
    """The score of a run's model on a split, as in a result; None if it is not there yet."""
    if recipes.is_ours(model.config):
        return logs.read_evaluation(folder / f"{split}.json")
    return logs.read_eval_lm(read(folder / f"{split}.log"))


def is_trained(text):
    """Whether a log says that training is complete."""
    # The second line is that of a run that was stopped between its last checkpoint and its end.
    return "done training in" in text or "nothing left to train" in text


def result_of(model_folder, model, seed, updates, splits, here):
    """What a finished run left on this machine (see ``machine``), as a result; see ``summary``."""
    folder = model_folder / f"seed{seed}"
    text = read(folder / "train.log")
    training = logs.read_training(text)
    if "Stopping training due to num_updates" not in text:
        raise RunFailed(
            f"ended after about {training.train[-1][0]:,} of {updates:,} updates: its config has "
            "another condition to stop; remove it and the run's folder"
        )
    tokens, seconds = training.tokens_per_update, training.seconds_per_update
    speed = json.loads(read(model_folder / "speed.json") or "{}")
    device, pace = logs.read_device(text), None
    # Measured while nothing else ran; the run itself may have been on another machine.
    same = here and is_same_machine(speed.get("machine"), here)
    if speed and same and speed.get("device", "CPU") == device:
        pace = float(f"{1 / seconds / speed['updates_per_second']:.3g}")
        seconds = 1 / speed["updates_per_second"]

    flops = json.loads(read(model_folder / "flops.json") or "{}").get("training_flops_per_token")

    return {
        "model": model.name,
        **({"recipe": model.variant} if model.variant else {}),
        "seed": seed,
        "parameters": logs.read_parameters(text),
        "updates": updates,
        "bytes": round(updates * tokens * training.bytes_per_token),
        "training_seconds": float(f"{updates * seconds:.6g}"),
        "training_tokens_per_second": float(f"{tokens / seconds:.6g}"),
        "pace": pace,
        "training_flops": flops and round(flops * updates * tokens),
        "peak_memory_mb": logs.read_peak(text),
        "device": device,
        **{split: evaluation_of(folder, model, split) for split in splits},
        "train_curve": training.train,
        "valid_curve": training.valid,
        "machine": here,
    }


def machine(processes):
    """The processor and the versions that a run was measured with, and how many ran at once."""
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
        "omp_num_threads": processes.environment.get("OMP_NUM_THREADS"),
        **({"runs at once": processes.parallel} if processes.parallel > 1 else {}),
        "commit": commit(),
        "python": platform.python_version(),
        **versions,
    }


def is_same_machine(first, second):
    """Whether times of two machines, as :func:`machine` describes them, can be compared."""
    return {**(first or {}), "commit": None} == {**second, "commit": None}


def commit():
    """The commit of the clone that the package runs from; None if there is none."""
    command = ["git", "-C", str(recipes.PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # no git
        return None
    return done.stdout.decode().strip() or None
