"""Memory and time of sparse attention as its length grows: one layer of the Sparse Transformer's
attention, forward and backward, one stream, no model around it.

Each point is a process of its own. Memory is the most that was resident, less what was after a step
of one block; queries, keys, values and their gradients are in it. Dense attention with a matrix of
all scores is beside it, up to a length that fits.

    python benchmarks/sparse_attention.py
"""

import multiprocessing
import resource
import time

import torch
from timing import arguments, describe_machine
from torch.utils.checkpoint import checkpoint

from fairseq_sha import ops
from fairseq_sha.ops.attention import attend_unfused, causal_bias

HEADS, WIDTH = 8, 64  # the paper's, enwik8
STRIDE, SUMMARY, NUM_SUMMARIES = 128, 32, 4
LENGTHS = [1536, 3072, 6144, 12288]


def all_scores(q, k, v):
    flat = (x.flatten(1, 2) for x in (q, k, v))
    return attend_unfused(*flat, causal_bias(q, k))


ATTENTION = {
    "fixed": lambda *x: ops.attend_fixed(*x, STRIDE, SUMMARY, NUM_SUMMARIES),
    "local": lambda *x: ops.attend_locally(*x, STRIDE),
    "strided": lambda *x: ops.attend_strided(*x, STRIDE),
    "dense, fused": ops.attend_to_all,
    "dense, all scores": all_scores,
}


def step(name, length):
    x = torch.randn(3, length, 1, HEADS, WIDTH, requires_grad=True)
    ATTENTION[name](*x.unbind()).sum().backward()


def point(name, length, threads):
    """Milliseconds and megabytes."""
    torch.set_num_threads(threads)
    # What torch loads at its first checkpoint is not counted.
    checkpoint(torch.neg, torch.zeros(1, requires_grad=True), use_reentrant=False)
    step(name, STRIDE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step(name, length)
    seconds = time.perf_counter() - start
    return 1e3 * seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--longest-dense", type=int, default=3072, help="with a matrix of scores")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(describe_machine())
    print("\n| attention | length | ms | MB |\n| --- | --- | --- | --- |")
    pool = multiprocessing.get_context("spawn")
    for name in ATTENTION:
        for length in args.lengths:
            if name == "dense, all scores" and length > args.longest_dense:
                continue
            with pool.Pool(1) as process:
                milliseconds, megabytes = process.apply(point, (name, length, args.threads))
            print(f"| {name} | {length:,} | {milliseconds:,.0f} | {megabytes:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
