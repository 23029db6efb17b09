"""What an attention window costs SHA-RNN: time and memory of a training step and of evaluation,
with full memories of 128 to 20,000 tokens, beside the model without attention.

Training is forward and backward without the optimiser, evaluation a forward pass, of one segment.
On a CPU, times are processor times, so that other work on the machine changes them little. All
windows are measured alternately in one process; the least of the repeats counts. Memory is the most
that a step needs beyond weights, tokens and the memory of the window itself, which has a column of
its own.

    python benchmarks/window.py --threads 1 --save runs/window.json
    python benchmarks/window.py --device cuda --streams 16 --length 1024 --width 1024
"""

import argparse
import json
import time

import torch
from models import build, random_tokens, settings
from timing import arguments, describe_machine, extra_memory, measure

WINDOWS = [128, 512, 1000, 2500, 5000, 10000, 20000]
CONFIG = "head_to_head/sha_rnn"


def prepare(window, args):
    """Functions for a training step and for evaluation, and the megabytes of the carried memory.
    Without a window, the model has no attention."""
    torch.manual_seed(1)
    layers = args.attention_layers if window else []
    section = {**settings(CONFIG)["model"], "attention_layers": layers, "window": window or 1}
    decoder = build({**section, "width": args.width}).decoder.to(args.device)
    tokens, targets = (random_tokens(args.length, args.streams, args.device) for _ in range(2))
    with torch.no_grad():
        _, state = decoder.read(tokens, None)
    memories = [layer for layer in state if "memory" in layer]
    for layer in memories:
        # As large as layer normalisation leaves it; what it holds changes no time.
        shape = window, args.streams, args.width
        layer["memory"] = torch.randn(shape, device=args.device)

    def train():
        decoder.train()
        features, _ = decoder.read(tokens, state, training=True)
        decoder.head.losses(features, targets).mean().backward()
        for parameter in decoder.parameters():
            parameter.grad = None

    @torch.no_grad()
    def evaluate():
        decoder.eval()
        decoder.head.losses(decoder.read(tokens, state)[0], targets)

    return train, evaluate, sum(layer["memory"].numel() for layer in memories) * 4 / 2**20


def main(argv=None):
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3, threads=1)
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS)
    parser.add_argument("--length", type=int, default=128, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--width", type=int, default=264)
    parser.add_argument("--attention-layers", nargs="+", type=int, default=[2])
    parser.add_argument("--save", help="write all figures to this JSON file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    machine = describe_machine(args.device)
    print(
        f"{machine}; width {args.width}, {args.streams} streams, segments of {args.length}, "
        f"{len(args.attention_layers)} of 4 layers attend"
    )
    windows = [0, *(window for window in args.windows if window >= args.length)]
    steps = {window: prepare(window, args) for window in windows}
    small = argparse.Namespace(**{**vars(args), "length": 2, "streams": 1})
    for run in prepare(8, small)[:2]:  # what libraries take once is not counted
        run()
    rows = []
    for window, (train, evaluate, carried) in steps.items():
        row = {"window": window, "carried MB": carried}
        row["evaluation MB"] = extra_memory(evaluate, args.device)
        row["training MB"] = extra_memory(train, args.device)
        rows.append(row)
    for index, kind in ((0, "training"), (1, "evaluation")):
        cases = {window: step[index] for window, step in steps.items()}
        for row, times in zip(rows, measure(cases, args.repeats, clock, warm_up=1).values()):
            row[f"{kind} ms"] = min(times)
    print(
        "\n| window | training, ms | to none | MB | evaluation, ms | to none | MB | memory of the "
        "window, MB |\n" + "| --- " * 8 + "|"
    )
    for row in rows:
        cells = [f"{row['window']:,}" if row["window"] else "no attention"]
        for kind in ("training", "evaluation"):
            taken, least = row[f"{kind} ms"], rows[0][f"{kind} ms"]
            cells += [f"{taken:,.0f}", f"{taken / least:.2f}", f"{row[f'{kind} MB']:,.0f}"]
        print(f"| {' | '.join([*cells, format(row['carried MB'], ',.0f')])} |")
    if args.save:
        with open(args.save, "w") as file:
            json.dump({"machine": machine, "options": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
