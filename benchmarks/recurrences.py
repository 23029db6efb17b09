"""A training step of each recurrence, forward and backward, beside loops over time under autograd.

The Mogrifier LSTM, its form without rounds, and a recurrent highway network stand beside torch's
LSTM, too.

The loop is the definition in ``fairseq_sha.ops.oracles``, which unbinds all steps at once. With
``--indexed``, a loop as most would first write it is measured too. It reads ``a[t]`` at each step,
so that its gradient adds up a tensor as large as all of ``a`` for each step. It takes minutes and
is run once.

python benchmarks/recurrences.py
"""

import time

import torch
from timing import arguments, compare, describe_machine, finish_work

from fairseq_sha.modules import LSTM, LayerNormLSTM
from fairseq_sha.ops import linear_recurrence, lstm, mogrifier_lstm, recurrent_highway, sru
from fairseq_sha.ops.oracles import (
    layer_norm_lstm_reference,
    linear_recurrence_reference,
    mogrifier_lstm_reference,
    recurrent_highway_reference,
    sru_reference,
)

ROUNDS = 6  # of the Mogrifier LSTM of 48M parameters
RANK = 0.068  # of its matrices, in multiples of the width


def indexed_linear_recurrence(a, b, h):
    states = []
    for t in range(len(a)):
        h = a[t] * h + b[t]
        states.append(h)
    return torch.stack(states), h


def indexed_sru(u, x, weight, bias, c):
    outputs = []
    for t in range(len(u)):
        f = torch.sigmoid(u[t, :, 1] + weight[0] * c + bias[0])
        r = torch.sigmoid(u[t, :, 2] + weight[1] * c + bias[1])
        c = u[t, :, 0] + (c - u[t, :, 0]) * f
        outputs.append(x[t] + (c - x[t]) * r)
    return torch.stack(outputs), c


def report(ours, definition, indexed, tensors, repeats):
    cases = {"ours": step(ours, tensors), "definition": step(definition, tensors)}
    medians = compare(cases, repeats, baseline="ours")
    if not indexed:
        return
    finish_work()
    start = time.perf_counter()
    step(indexed, tensors)()
    finish_work()
    taken = 1e3 * (time.perf_counter() - start)
    print(f"| loop that reads a[t] | {taken:.0f} | once | {taken / medians['ours']:.0f} |")


def step(form, inputs):
    def run():
        for tensor in inputs:
            tensor.grad = None
        outputs = form(*inputs)[0]
        outputs.backward(torch.ones_like(outputs))

    return run


def report_loops(shape, depth, device, repeats):
    """The loops over time whose gates depend on the state, as ratios to torch's LSTM."""
    length, streams, width = shape

    def weights(*sizes):
        return (torch.randn(sizes, device=device) / sizes[-1] ** 0.5).requires_grad_()

    x = weights(*shape)
    state = torch.zeros(streams, width, device=device)
    gates = [weights(4 * width, width), weights(4 * width, width), weights(4 * width)]
    rank = max(1, round(RANK * width))
    rounds = [(weights(rank, width), weights(width, rank), weights(width)) for _ in range(ROUNDS)]
    maps = [weight for maps in rounds for weight in maps]
    highway = [weights(2 * width, width), weights(depth, 2 * width, width)]
    highway += [weights(depth, 2 * width)]
    forms = {
        "LSTM": (lambda: lstm(x, state[None], state[None], *gates, gates[2]), [x, *gates]),
    }
    for name, form in (("ours", mogrifier_lstm), ("definition", mogrifier_lstm_reference)):
        forms[f"LSTM with a capped gate, {name}"] = (
            lambda form=form: form(x, state, state, *gates),
            [x, *gates],
        )
        forms[f"Mogrifier LSTM, {ROUNDS} rounds of rank {rank}, {name}"] = (
            lambda form=form: form(x, state, state, *gates, rounds),
            [x, *gates, *maps],
        )
    for name, form in (("ours", recurrent_highway), ("definition", recurrent_highway_reference)):
        forms[f"recurrent highway network, depth {depth}, {name}"] = (
            lambda form=form: form(x @ highway[0].t(), state, *highway[1:]),
            [x, *highway],
        )
    cases = {name: step(lambda *_, f=form: f(), inputs) for name, (form, inputs) in forms.items()}
    compare(cases, repeats, baseline="LSTM")


def report_lstms(shape, device, repeats):
    """The layer-normalised LSTM beside torch's, each with its products of inputs."""
    x = torch.randn(shape, device=device, requires_grad=True)
    cells = {"LSTM": LSTM(shape[-1]), "ours": LayerNormLSTM(shape[-1])}
    cells["definition"] = LayerNormLSTM(shape[-1])
    cells["definition"].recurrence = layer_norm_lstm_reference
    cases = {}
    for name, cell in cells.items():
        cell.to(device)
        cases[name] = step(lambda x, *_, cell=cell: cell(x, {}), [x, *cell.parameters()])
    compare(cases, repeats, baseline="LSTM")


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=5, help="of the recurrent highway network")
    parser.add_argument("--indexed", action="store_true", help="measure this loop, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    shape = args.length, args.streams, args.width
    per_unit, state = (2, args.width), shape[1:]
    print(
        f"{describe_machine(args.device)}; {args.length} x {args.streams} x {args.width}, float32"
    )

    def inputs(*shapes):
        return [torch.randn(size, device=args.device, requires_grad=True) for size in shapes]

    print("\nSRU\n")
    tensors = inputs((*shape[:2], 3, args.width), shape, per_unit, per_unit, state)
    report(sru, sru_reference, args.indexed and indexed_sru, tensors, args.repeats)
    print("\ngated linear recurrence\n")
    tensors = [torch.rand(shape, device=args.device, requires_grad=True), *inputs(shape, state)]
    report(
        linear_recurrence,
        linear_recurrence_reference,
        args.indexed and indexed_linear_recurrence,
        tensors,
        args.repeats,
    )
    print("\nloops over time with matrix products\n")
    report_loops(shape, args.depth, args.device, args.repeats)
    print("\nlayer-normalised LSTM\n")
    report_lstms(shape, args.device, args.repeats)


if __name__ == "__main__":
    main()
