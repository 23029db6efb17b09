"""Find learning rate and decay for dynamic evaluation on the first part of a split.

    fairseq-sha tune-dynamic data-bin/enwiki6 --path checkpoint.pt --dynamic sgd rms

Every learning rate is tried with every decay on the first --tokens of valid; a learning rate of 0
is the static score. Prints this grid, and the options of the best for fairseq-sha evaluate and,
without --context-window, score.

--score test also scores that split, statically and with the choice of each rule, in one stream and
in the same segments. With --out FOLDER, the figures of this model become FOLDER/NAME.json, with the
time and the memory that they took, and FOLDER/table.md the table of all models in the folder.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

from fairseq_sha.commands.common import (
    add_model_arguments,
    check_new,
    load_model,
    use_symbols_of_data,
)
from fairseq_sha.commands.dynamic_options import (
    SEGMENT,
    add_dynamic_arguments,
    add_statistics_arguments,
    check_dynamic,
    dynamic_policy,
    gradient_statistics,
    statistics_path,
)
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

# Around what was best for small models of enwiki6 (sgd), and published for enwik8 (rms, 1.2e-5).
RATES = {"sgd": [0.01, 0.02, 0.05, 0.1], "rms": [1e-6, 3e-6, 1e-5, 3e-5]}
DECAYS = [0.0, 0.001, 0.01]
TITLES = {"sgd": "SGD", "rms": "RMS"}


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument("data", help="data folder")
    add_model_arguments(parser)
    parser.add_argument(
        "--tune-split", default="valid", metavar="SPLIT", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=100_000,
        metavar="N",
        help="how much of it is read (default: %(default)s)",
    )
    parser.add_argument("--score", metavar="SPLIT", help="score another split with the choice")
    parser.add_argument(
        "--context-window",
        type=int,
        default=0,
        help="for models without state: context of each prediction in tokens (default: none)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the figures and the table")
    parser.add_argument(
        "--name", help="of the model in the table (default: the folder of its checkpoints)"
    )
    add_dynamic_arguments(parser, several=True)
    add_statistics_arguments(parser)


def run(args):
    """Tune, score, and print."""
    check(args)
    use_symbols_of_data(args)
    name = args.name or _name_of(args.path)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        check_new([args.out / f"{name}.json"])
        rows_of(args)  # raises an error before hours of reading
    trained = load_model(args, allow_stock=True)
    if "rms" in args.dynamic:  # what is wrong with statistics is found before hours of reading
        if statistics_path(args).exists():
            gradient_statistics(args, trained, args.context_window)
        else:
            check_new([statistics_path(args)])
    figures = tune_and_score(trained, args)
    if args.out:
        content = {"model": name, **figures}
        write_atomically(args.out / f"{name}.json", json.dumps(content) + "\n")
        write_atomically(args.out / "table.md", table(rows_of(args)))


def rows_of(args):
    """The figures of all models in the folder ``--out``, for :func:`table`.

    Raises:
        UserError: a file holds anything else, or figures of another split or of other segments
    """
    rows, asked = [], {"split": args.score, "segment": args.dynamic_segment or SEGMENT}
    for path in sorted(args.out.glob("*.json")):
        try:
            row = json.loads(path.read_bytes())
            table([row])
            found = {key: row[key] for key in asked}
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: not figures of tune-dynamic; name another folder with --out")
        if found != asked:
            raise UserError(
                f"{path}: is of split {found['split']} and segments of {found['segment']}; a table "
                "holds models that read the same, so name another folder with --out"
            )
        rows.append(row)
    return rows


def check(args):
    """Raise a UserError for options that give no honest score, or none at all."""
    check_dynamic(args)
    if args.tune_split.startswith("test"):
        raise UserError(
            f"--tune-split {args.tune_split}: test is not for tuning; name another, such as valid"
        )
    if args.score == args.tune_split:
        raise UserError(f"--score {args.score}: is what the rates are tuned on; name another split")
    if args.out and not args.score:
        raise UserError("--out: is for figures of a split; name it with --score")
    if args.name and not args.out:
        raise UserError("--name: is for the table in --out; add it")
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    if args.context_window < 0:
        raise UserError(f"--context-window {args.context_window}: must be at least 0")


def _name_of(path):
    folder = Path(path).absolute().parent
    return folder.parent.name if folder.name == "checkpoints" else folder.name


def tune_and_score(trained, args):
    """The grid and the choice of each rule, printed as they are found, and the scores with them.

    What learns comes last, so that the peak memory of the process tells what it needs.

    Returns:
        dict, as in the file of ``--out``
    """
    from fairseq_sha.evaluation.policies import Tokens

    task = trained.task
    segment = args.dynamic_segment or SEGMENT
    static = task.evaluation_policy(1, segment, args.context_window)
    for split in filter(None, (args.tune_split, args.score)):
        task.load_dataset(split)
    tuned_on = Tokens(task.dataset(args.tune_split).tokens[: args.tokens + 1])
    about = f"first {len(tuned_on):,} tokens of {args.tune_split}"
    figures = {
        "parameters": sum(p.numel() for p in trained.models[0].parameters()),
        "tuned_on": about,
        "segment": segment,
    }
    if args.score:
        figures["split"] = args.score
        figures["static"] = scored(trained, task.dataset(args.score), args.score, static)
    for rule in sorted(set(args.dynamic), key=list(RATES).index):
        points = grid(args.dynamic_lr or RATES[rule], args.dynamic_decay or DECAYS)
        one = {"dynamic": rule, "dynamic_lr": points[0][0], "dynamic_decay": points[0][1]}
        options_of_one = argparse.Namespace(**{**vars(args), **one})
        policy = dynamic_policy(options_of_one, trained, args.context_window)
        policies = {
            (rate, decay): replace(policy, rule=replace(policy.rule, lr=rate, decay=decay))
            for rate, decay in points
        }
        bits = {
            point: scored(trained, tuned_on, args.tune_split, policy)["bits_per_byte"]
            for point, policy in policies.items()
        }
        best = min(bits, key=lambda point: bits[point] if math.isfinite(bits[point]) else math.inf)
        print(f"{TITLES[rule]}, {about}, segments of {segment}, bits per byte:\n")
        print(f"{grid_table(bits)}\n\nbest: {options(rule, best, args)}{at_the_end(best, bits)}\n")
        figures[rule] = {
            "grid": [[*point, value] for point, value in bits.items()],
            "lr": best[0],
            "decay": best[1],
        }
        if args.score:
            corpus = task.dataset(args.score)
            figures[rule].update(scored(trained, corpus, args.score, policies[best]))
    for rule in ("static", "sgd", "rms") if args.score else ():
        if rule in figures:
            bits, policy = figures[rule]["bits_per_byte"], figures[rule]["policy"]
            print(f"{args.score}: {bits:.4f} bits per byte ({policy})")
    return figures


def grid(rates, decays):
    """Points ``(learning rate, decay)``. The first has a learning rate of 0, so that no choice is
    worse than what does not learn."""
    return [
        (rate, decay)
        for rate in sorted({0.0, *rates})
        for decay in sorted(set(decays) if rate else {0.0})
    ]


def scored(trained, corpus, split, policy):
    """What reading a text cost: the score, seconds, and the peak memory of the process so far, or
    of the GPU, in MB."""
    import torch

    from fairseq_sha.evaluation.evaluate import evaluate

    on_gpu = trained.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    score, _ = evaluate(trained.models[0], corpus, split, trained.codec, policy, progress=True)
    seconds = time.perf_counter() - started
    return {
        "bits_per_byte": score.bits_per_byte,
        **score._asdict(),
        "seconds": round(seconds, 3),
        "peak_mb": torch.cuda.max_memory_allocated() >> 20 if on_gpu else peak_of_process(),
    }


def peak_of_process():
    """Peak resident memory in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def options(rule, point, args):
    """What to give to ``fairseq-sha evaluate``."""
    words = [f"--dynamic {rule} --dynamic-lr {point[0]:g} --dynamic-decay {point[1]:g}"]
    for option in ("segment", "epsilon", "statistics"):
        value = getattr(args, f"dynamic_{option}")
        if value is not None and (option == "segment" or rule == "rms"):
            words.append(f"--dynamic-{option} {value}")
    if args.context_window:
        words.append(f"--context-window {args.context_window}")
    return " ".join(words)


def at_the_end(best, bits):
    """A warning if the best learning rate is the smallest or the largest above 0 that was tried."""
    if best[0] == 0:
        return ""
    rates = [rate for rate, _ in bits if rate > 0]
    ends = {"smaller": min(rates), "larger": max(rates)}
    wanted = " and ".join(name for name, end in ends.items() if end == best[0])
    return f" (the end of the grid; try {wanted} rates)" if wanted else ""


def grid_table(bits):
    """Bits per byte in Markdown: a row for each learning rate, a column for each decay."""
    decays = sorted({decay for _, decay in bits})
    head = " | ".join(f"decay {decay:g}" for decay in decays)
    lines = [f"| learning rate | {head} |", "| --- " * (1 + len(decays)) + "|"]
    for rate in sorted({rate for rate, _ in bits}):
        cells = (f"{bits[rate, d]:.4f}" if (rate, d) in bits else "" for d in decays)
        lines.append(f"| {rate:g}{'' if rate else ' (static)'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows):
    """The models of a folder in Markdown. Static and dynamic scores have columns of their own.

    Args:
        rows (list of dict): as :func:`tune_and_score` returns them, with ``model``
    """
    rules = [rule for rule in TITLES if any(rule in row for row in rows)]
    kinds = ["static", *rules]
    titles = ["model", "parameters", "bytes"]
    titles += [f"bits per byte, {TITLES.get(kind, kind)}" for kind in kinds]
    titles += [f"{TITLES[rule]}: learning rate, decay" for rule in rules]
    titles += [f"seconds, {TITLES.get(kind, kind)}" for kind in kinds]
    titles += [f"peak memory in MB, {TITLES.get(kind, kind)}" for kind in kinds]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]

    def cells(row, kinds, format_):
        return [format_.format(**row[kind]) if kind in row else "" for kind in kinds]

    for row in rows:
        values = [row["model"], f"{row['parameters']:,}", f"{row['static']['bytes']:,}"]
        values += cells(row, kinds, "{bits_per_byte:.3f}")
        values += cells(row, rules, "{lr:g}, {decay:g}")
        values += cells(row, kinds, "{seconds:,.0f}")
        values += cells(row, kinds, "{peak_mb:,}")
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"
