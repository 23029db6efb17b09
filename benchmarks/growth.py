"""How time and memory grow: with the window, segments, streams and width of SHA-RNN, and with the
corpus, from 1 MB to 1 GB.

Each point is a process of its own. Time is that of a training step, the median of some, with a full
memory; of the corpus, that of opening it and reading the first segment, imports left out. Memory is
the most that was resident, less what the imports took; of the corpus, without mapped files.

    python benchmarks/growth.py --save benchmarks/results
"""

import json
import logging
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from models import build, random_tokens, steady_state
from timing import arguments, describe_machine, measure

from fairseq_sha.tasks.byte_language_modeling import ByteLanguageModelingTask
from fairseq_sha.tasks.segment_language_modeling import SegmentLanguageModelingConfig

BASE = {"window": 1000, "length": 128, "streams": 8, "width": 256}
GROWTH = {
    "window": [128, 1000, 2500, 5000, 10000, 20000],
    "length": [32, 64, 128, 256, 512, 1000],
    "streams": [1, 2, 4, 8, 16, 32],
    "width": [64, 128, 256, 512, 1024],
}
MEGABYTES = [1, 10, 100, 1000]
UNITS = {"window": "tokens", "length": "tokens", "streams": "", "width": "", "corpus": "MB"}


def resident():
    """Megabytes, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def own():
    """Megabytes that are this process's own now: not those of mapped files, which the system takes
    back when it needs them."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def training_step(sizes, threads, repeats):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    before = resident()
    section = {"_name": "sha_rnn_small", "width": sizes["width"], "window": sizes["window"]}
    decoder = build(section).decoder.train()
    tokens, targets = (random_tokens(sizes["length"], sizes["streams"]) for _ in range(2))
    state = steady_state(decoder, tokens)

    def step():
        features, _ = decoder.read(tokens, state, training=True)
        decoder.head.losses(features, targets).mean().backward()
        decoder.zero_grad()

    times = measure({"step": step}, repeats)["step"]
    return statistics.median(times), resident() - before


def opening(folder):
    before, start = own(), time.perf_counter()
    defaults = vars(SegmentLanguageModelingConfig())
    task = ByteLanguageModelingTask.setup_task(Namespace(**{**defaults, "data": folder}))
    task.load_dataset("train")
    next(iter(task.eval_lm_dataloader(task.dataset("train"), batch_size=16)))
    return 1e3 * (time.perf_counter() - start), own() - before


def corpus(megabytes, pool):
    """Write so much text, convert it, and open it."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        rng = np.random.RandomState(1)
        page = rng.randint(32, 127, 10**6).astype(np.uint8)
        page[rng.rand(len(page)) < 1 / 80] = 10
        with open(text, "wb") as file:
            for _ in range(megabytes):
                file.write(page.tobytes())
        script = Path(__file__).parent.parent / "preprocess" / "bytes.py"
        start = time.perf_counter()
        command = [sys.executable, script, "--input", text, "--dest", f"{folder}/data"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        converted = 1e3 * (time.perf_counter() - start)
        with pool.Pool(1) as process:
            opened = process.apply(opening, (f"{folder}/data",))
        return (*opened, converted)


def corpora(largest, pool):
    points = []
    print("\n| corpus, MB | opening it, ms | MB | preprocess/bytes.py, ms |")
    print("| --- " * 4 + "|")
    for megabytes in MEGABYTES:
        if megabytes <= largest:
            points.append((megabytes, *corpus(megabytes, pool)))
            cells = (f"{value:,.0f}" for value in points[-1])
            print("| " + " | ".join(cells) + " |", flush=True)
    return points


def plot(points, machine, path):
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes all talkative
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(points), figsize=(4 * len(points), 6), sharex="col")
    for column, (name, values) in zip(rows.T, points.items()):
        sizes = [value[0] for value in values]
        for axes, index, label in zip(column, (1, 2), ("ms", "MB")):
            axes.plot(sizes, [value[index] for value in values], "o-")
            axes.set_ylim(bottom=0)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        if name == "corpus":
            column[0].set_xscale("log")
        column[0].set_title("opening a corpus" if name == "corpus" else f"training step: {name}")
        column[1].set_xlabel(f"{name} {UNITS[name] and f'({UNITS[name]})'}")
    others = ", ".join(f"{name} {value}" for name, value in BASE.items())
    figure.suptitle(f"SHA-RNN, one head; {others} where not varied\n{machine}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv=None):
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--save", help="folder for growth.json and growth.png")
    parser.add_argument("--largest", type=int, default=1000, help="megabytes of corpus")
    parser.add_argument(
        "--only", nargs="+", choices=[*GROWTH, "corpus"], default=[*GROWTH, "corpus"]
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine, points = describe_machine(), {}
    print(machine)
    pool = multiprocessing.get_context("spawn")
    for name in args.only:
        if name == "corpus":
            points[name] = corpora(args.largest, pool)
            continue
        print(f"\n| {name} | training step, ms | MB |\n| --- | --- | --- |")
        points[name] = []
        for size in GROWTH[name]:
            with pool.Pool(1) as process:
                case = {**BASE, name: size}, args.threads, args.repeats
                points[name].append((size, *process.apply(training_step, case)))
            print("| {:,} | {:,.0f} | {:,.0f} |".format(*points[name][-1]), flush=True)
    if not args.save:
        return
    os.makedirs(args.save, exist_ok=True)
    with open(f"{args.save}/growth.json", "w") as file:
        json.dump({"machine": machine, "base": BASE, "points": points}, file, indent=1)
    plot(points, machine, f"{args.save}/growth.png")


if __name__ == "__main__":
    main()
