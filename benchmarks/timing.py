"""Time several things fairly: alternately, in one run, and report medians as ratios."""

import argparse
import multiprocessing
import platform
import resource
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def measure(cases, repeats, clock=time.perf_counter, warm_up=2):
    """Run each case in turn, some times to warm up and then ``repeats`` times.

    Args:
        cases (dict of str to callable): what to time
        clock (callable): gives seconds; ``time.process_time`` leaves out what other processes take

    Returns:
        dict of str to list of float: milliseconds of each run
    """
    times = {name: [] for name in cases}
    for number in range(-warm_up, repeats):
        for name, run in cases.items():
            finish_work()
            start = clock()
            run()
            finish_work()
            if number >= 0:
                times[name].append(1e3 * (clock() - start))
    return times


def extra_memory(run, device="cpu"):
    """The most megabytes that a function needs beyond what is in use before it. On a CPU, where it
    is the resident size of a forked process, no other function must have run before."""
    if torch.device(device).type == "cuda":
        finish_work()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        there.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    process = fork.Process(target=child)
    process.start()
    there.close()
    kilobytes = here.recv()
    process.join()
    return kilobytes / 2**10


def finish_work():
    """Wait for what the GPU has been given to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(cases, repeats, baseline):
    """:func:`measure`, and print a Markdown table of milliseconds and of ratios to one case.

    Returns:
        dict of str to float: the medians in milliseconds
    """
    times = measure(cases, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| case | median ms | fastest to slowest | time / " + baseline + " |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        ratio = medians[name] / medians[baseline]
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {name} | {medians[name]:.1f} | {spread} | {ratio:.2f} |")
    return medians


def describe_machine(device="cpu"):
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
