"""Loss and gradient over a large vocabulary: time and memory of the adaptive softmax and of a
softmax over all words, beside fairseq's AdaptiveSoftmax and a linear layer with cross-entropy.

Targets are drawn as words are: the n-th most frequent one with a probability in proportion to 1/n.
Each case runs in a process of its own, since memory that was used once stays with a process.

    python benchmarks/softmax.py [--words 267735] [--width 1024] [--targets 4096]
"""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from timing import arguments, describe_machine, measure

from fairseq_sha.models.embeddings import AdaptiveEmbedding, Bands
from fairseq_sha.models.heads import AdaptiveSoftmaxHead, SoftmaxHead

CUTOFFS = (20_000, 40_000, 200_000)  # published, for WikiText-103


def adaptive(args):
    """Ours, as in Transformer-XL's large model."""
    edges = (0, *(c for c in CUTOFFS if c < args.words), args.words)
    widths = tuple(args.width // 4**i for i in range(len(edges) - 1))
    bands = Bands(args.width, 0, edges, widths, True, "all", True, "embedding", 0.0)
    head = AdaptiveSoftmaxHead(AdaptiveEmbedding(bands)).to(args.device)
    return head, lambda h, targets: head.losses(h, targets).mean()


def fairseq_adaptive(args):
    """fairseq's, with the same bands, tied in the same way, and its criterion's loss."""
    cutoffs = [c for c in CUTOFFS if c < args.words] + [args.words]
    inputs = AdaptiveInput(args.words, 0, args.width, 4.0, args.width, cutoffs)
    head = AdaptiveSoftmax(
        args.words, args.width, cutoffs, 0.0, 4.0, adaptive_inputs=inputs, tie_proj=True
    ).to(args.device)

    def loss(h, targets):
        pairs = zip(*head(h, targets))
        total = sum(F.cross_entropy(x, y, reduction="sum") for x, y in pairs if y is not None)
        return total / len(targets)

    return head, loss


def full(args):
    """Ours over all words, with losses in pieces of rows."""
    head = SoftmaxHead(args.width, args.words).to(args.device)
    return head, lambda h, targets: head.losses(h, targets).mean()


def plain(args):
    """A linear layer and cross-entropy, with the logits of all targets."""
    head = torch.nn.Linear(args.width, args.words).to(args.device)
    return head, lambda h, targets: F.cross_entropy(head(h).float(), targets)


CASES = {
    "adaptive softmax": adaptive,
    "fairseq's AdaptiveSoftmax": fairseq_adaptive,
    "softmax, in pieces": full,
    "linear and cross_entropy": plain,
}


def main(argv=None):
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--words", type=int, default=267_735)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--targets", type=int, default=4096)
    parser.add_argument("--amp", action="store_true", help="under autocast, in bfloat16")
    parser.add_argument("--case", choices=CASES, help="this one only, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(run(args)))
        return
    precision = "bfloat16 under autocast" if args.amp else "float32"
    print(
        f"{describe_machine(args.device)}, {precision}; {args.words:,} words, width {args.width}, "
        f"{args.targets:,} targets\n"
    )
    print("| loss and gradient | ms | fastest to slowest | time / first | MB beyond parameters |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for name in CASES:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--case", name]
        done = subprocess.run([*command, *(argv or sys.argv[1:])], capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:80]} | | | |")
            continue
        result = SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))
        median = statistics.median(result.times)
        first = first or median
        spread = f"{min(result.times):.1f} to {max(result.times):.1f}"
        print(f"| {name} | {median:.1f} | {spread} | {median / first:.2f} | {result.memory:,.0f} |")


def run(args):
    """Times in ms, and the peak of memory less that of parameters and inputs, in MB."""
    torch.manual_seed(1)
    head, loss = CASES[args.case](args)
    frequencies = 1 / torch.arange(1, args.words + 1, dtype=torch.float)
    targets = torch.multinomial(frequencies, args.targets, replacement=True).to(args.device)
    h = torch.randn(args.targets, args.width, device=args.device, requires_grad=True)
    device = torch.device(args.device).type

    def step():
        head.zero_grad(set_to_none=True)
        h.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=args.amp):
            value = loss(h, targets)
        value.backward()

    before = memory(device)
    times = measure({"step": step}, args.repeats)["step"]
    return {"times": times, "memory": memory(device) - before}


def memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
