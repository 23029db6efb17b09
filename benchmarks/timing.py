"""Time several things fairly: alternately, in one run, and report medians as ratios."""

import argparse
import platform
import statistics
import time

import torch


def arguments(description):
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="times each case is run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def compare(cases, repeats, baseline):
    """Run each case ``repeats`` times in turn; print a Markdown table of milliseconds and ratios.

    Args:
        cases (dict of str to callable): what to time; each has had two runs to warm up
        baseline (str): the case that the ratios are to

    Returns:
        dict of str to float: the medians in milliseconds
    """
    times = {name: [] for name in cases}
    for _ in range(2):
        for run in cases.values():
            run()
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| case | median ms | fastest to slowest | time / " + baseline + " |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        ratio = medians[name] / medians[baseline]
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {name} | {medians[name]:.1f} | {spread} | {ratio:.2f} |")
    return medians


def describe_machine():
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
