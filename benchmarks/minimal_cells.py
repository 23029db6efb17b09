"""A training step of minGRU and minLSTM beside a GRU and an LSTM, over the length of sequences.

"Were RNNs All We Needed?" (arXiv 2410.01201) reports factors of hundreds. They depend on what a GRU
is compared as: as torch runs it, or as a Python loop over cells. Both are here. A step is forward
and backward of one layer with its matrix products, from the gradient of its outputs to those of its
weights and inputs, without the optimiser.

On a CPU, times are processor times, so that other work on the machine changes them little. All
layers are measured alternately in one process; the least of the repeats counts. Memory is the most
that a step needs beyond weights and inputs.

    python benchmarks/minimal_cells.py --threads 1 --save runs/minimal_cells.json
    python benchmarks/minimal_cells.py --device cuda --width 256
"""

import json
import time

import torch
from timing import arguments, describe_machine, extra_memory, measure
from torch import nn

from fairseq_sha.modules import MinGRU, MinLSTM

LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]


class Loop(nn.Module):
    """A cell of torch's, called for each step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind():
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


class Whole(nn.Module):
    """A layer that reads a sequence at once, from an empty state."""

    def __init__(self, layer, *state):
        super().__init__()
        self.layer = layer
        self.state = state

    def forward(self, x):
        return self.layer(x, *self.state)[0]


LAYERS = {
    "minGRU": lambda width: Whole(MinGRU(width), {}),
    "minLSTM": lambda width: Whole(MinLSTM(width), {}),
    "GRU, torch": lambda width: Whole(nn.GRU(width, width)),
    "LSTM, torch": lambda width: Whole(nn.LSTM(width, width)),
    "GRU, Python loop": lambda width: Loop(nn.GRUCell(width, width)),
    "LSTM, Python loop": lambda width: Loop(nn.LSTMCell(width, width)),
}


def step(name, length, args):
    """A function that does one training step."""
    torch.manual_seed(1)
    layer = LAYERS[name](args.width).to(args.device)
    x = torch.randn(length, args.streams, args.width, device=args.device, requires_grad=True)
    gradient = torch.randn(length, args.streams, args.width, device=args.device)

    def run():
        layer(x).backward(gradient)
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    return run


def main(argv=None):
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3, threads=1)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--streams", type=int, default=64, help="batch size (default: the paper's)")
    parser.add_argument("--width", type=int, default=64, help="of inputs and states")
    parser.add_argument("--save", help="write all figures to this JSON file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    machine = describe_machine(args.device)
    print(f"{machine}; width {args.width}, {args.streams} sequences, float32")
    found = {name: {"ms": [], "MB": []} for name in LAYERS}
    for name in LAYERS:  # what libraries take once is not counted
        step(name, 2, args)()
    # Memory is first, see extra_memory. Inputs are kept: what they leave would be used again.
    cases = {n: {name: step(name, n, args) for name in LAYERS} for n in args.lengths}
    for of_length in cases.values():
        for name, run in of_length.items():
            found[name]["MB"].append(extra_memory(run, args.device))
    for of_length in cases.values():
        for name, times in measure(of_length, args.repeats, clock, warm_up=1).items():
            found[name]["ms"].append(min(times))
    for title, unit in (("Milliseconds", "ms"), ("Megabytes", "MB")):
        print(f"\n{title} of a training step; in parentheses: to minGRU\n")
        print(f"| tokens | {' | '.join(LAYERS)} |\n" + "| --- " * (1 + len(LAYERS)) + "|")
        for i, length in enumerate(args.lengths):
            least = found["minGRU"][unit][i]
            cells = [f"{row[unit][i]:,.0f} ({row[unit][i] / least:.2f})" for row in found.values()]
            print(f"| {length:,} | {' | '.join(cells)} |")
    if args.save:
        content = {"machine": machine, "options": vars(args), "layers": found}
        with open(args.save, "w") as file:
            json.dump(content, file, indent=1)


if __name__ == "__main__":
    main()
