"""A training step and an evaluation pass of every model: time, memory, and where they go.

The floor is the time of the recurrent kernels and matrix products alone (those of attention too,
and of scores that are computed anew), run by themselves, in turn with the whole. Models are those
of examples/: at the size of the demo, of the comparison (some 256 wide), and of the papers. Each is
measured in a process of its own, for its peak memory, that of imports included. Weights are random,
memories full; a training step is forward and backward, an evaluation pass a forward one, of one
segment.

    python benchmarks/steps.py --sizes demo 256 "paper, short segments"
    python benchmarks/steps.py --sizes paper --models sha_rnn_enwik8 --device cuda --precision amp
"""

import gc
import json
import multiprocessing
import resource
import statistics
from contextlib import nullcontext

import torch
from kernels import FLOOR, KINDS, Recording
from models import build, configs, random_tokens, settings, steady_state
from timing import arguments, describe_machine, measure

COMPARED = [*configs("head_to_head"), *configs("recurrences")]
PAPERS = configs("enwik8")
SIZES = {  # configs, tokens and streams of a segment, and what differs from the config's model
    "demo": (COMPARED, 64, 16, {"width": 192}),
    "256": (COMPARED, 128, 16, {}),
    "paper, short segments": (PAPERS, 64, 4, {}),
    "paper": (PAPERS, None, None, {}),  # the config's
}


def measure_step(case, args):
    """One row of the table: a dict."""
    size, name = case
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    config = settings(name)
    model = build({**config["model"], **SIZES[size][3]}).to(args.device)
    if args.precision == "bfloat16":
        model.bfloat16()
    if args.compile:
        model.decoder.compile_layers()
    row = {
        "size": size,
        "model": name.partition("/")[2],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    # One state at a time, and memory first: kernels are recorded with their arguments. The
    # evaluation comes first, since on CPU a peak is that of the process so far.
    for kind in ("evaluation", "training"):
        run, row[f"{kind} tokens"] = prepare(kind, model.decoder, size, config, args)
        row[f"{kind} MB"] = peak_of(run, args.device)
        del run
    for kind in ("evaluation", "training"):
        run, _ = prepare(kind, model.decoder, size, config, args)
        row.update(times_of(run, kind, args))
        del run
    return row


def prepare(kind, decoder, size, config, args):
    """A function that reads a segment from a steady state, and the number of its tokens."""
    _, length, streams, _ = SIZES[size]
    dataset = config["dataset"]
    own = dataset.get("batch_size_valid") if kind == "evaluation" else None
    length = args.length or length or config["task"]["tokens_per_sample"]
    streams = args.streams or streams or own or dataset["batch_size"]
    cast = nullcontext()
    if args.precision == "amp":
        cast = torch.autocast(torch.device(args.device).type)
    decoder.train(kind == "training")
    tokens, targets = (random_tokens(length, streams, args.device) for _ in range(2))
    with cast:
        state = steady_state(decoder, tokens)

    def train():
        with cast:
            features, _ = decoder.read(tokens, state, training=True)
            loss = decoder.head.losses(features, targets).mean()
        loss.backward()
        for parameter in decoder.parameters():
            parameter.grad = None

    @torch.no_grad()
    def evaluate():
        with cast:
            decoder.head.logits(decoder.read(tokens, state)[0])

    return (train if kind == "training" else evaluate), length * streams


def peak_of(run, device):
    """The most memory in MB that was in use while a function ran."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def times_of(run, kind, args):
    """Times of a function and of its kernels alone: entries of a row."""
    parts, flop = kernels_of(run, args)
    times = measure({"whole": run, **parts}, args.repeats)
    medians = {part: statistics.median(values) for part, values in times.items()}
    whole = medians.pop("whole")
    row = {
        f"{kind} ms": whole,
        f"{kind} spread": (max(times["whole"]) - min(times["whole"])) / whole,
    }
    if medians:
        row[f"{kind} gflop"] = flop / 1e9
        row[f"{kind} floor"] = sum(medians[part] for part in FLOOR)
        row[f"{kind} shares"] = {part: medians[part] / whole for part in KINDS}
    return row


def kernels_of(run, args):
    """Functions by kind that run the kernels of ``run`` alone, and their number of floating-point
    operations; none where they are compiled, or their arguments are more than the memory holds."""
    if args.compile:
        return {}, 0
    recording = Recording()
    try:
        with recording:
            run()
    except torch.cuda.OutOfMemoryError:
        del recording
        gc.collect()
        torch.cuda.empty_cache()
        return {}, 0
    return {kind: recording.replay(kind) for kind in KINDS}, recording.flop


def main(argv=None):
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["256"])
    parser.add_argument("--models", nargs="+", help="names of configs (default: all)")
    parser.add_argument("--length", type=int, help="tokens of a segment")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "amp"])
    parser.add_argument("--compile", action="store_true", help="as with the task's --compile")
    parser.add_argument("--json", help="write all figures to this file, too")
    args = parser.parse_args(argv)
    pool = multiprocessing.get_context("spawn")
    rows = []
    for size in args.sizes:
        print(f"\n{describe_machine(args.device)}; {args.precision}; size: {size}\n")
        print(
            "| model | parameters | training, ms | spread | tokens/s | MB | to the floor "
            "| evaluation, ms | spread | tokens/s | MB | to the floor | GFLOP/s, training | "
            + " | ".join(f"training: {kind}" for kind in (*KINDS, "the rest"))
            + " |\n"
            + "| --- " * (14 + len(KINDS))
            + "|"
        )
        for name in SIZES[size][0]:
            if args.models and name.partition("/")[2] not in args.models:
                continue
            try:
                with pool.Pool(1) as process:
                    row = process.apply(measure_step, ((size, name), args))
            except torch.cuda.OutOfMemoryError:
                print(f"| {name.partition('/')[2]} | out of memory |", flush=True)
                continue
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


def line(row):
    cells = [row["model"], f"{row['parameters'] / 1e6:.1f}M"]
    for kind in ("training", "evaluation"):
        taken, floor = row[f"{kind} ms"], row.get(f"{kind} floor")
        cells += [f"{taken:.1f}", f"{row[f'{kind} spread']:.0%}"]
        speed = 1e3 * row[f"{kind} tokens"] / taken
        cells += [f"{speed:,.0f}", f"{row[f'{kind} MB']:,.0f}"]
        cells += [f"{taken / floor:.2f}" if floor else "-"]
    shares = row.get("training shares")
    if shares:
        cells += [f"{1e3 * row['training gflop'] / row['training ms']:,.0f}"]
        cells += [f"{share:.0%}" for share in (*shares.values(), 1 - sum(shares.values()))]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
