"""A training step of each recurrence, forward and backward, beside a plain loop over time.

python benchmarks/recurrences.py
"""

import torch
from timing import arguments, compare, describe_machine

from fairseq_sha.ops import linear_recurrence, linear_recurrence_reference, sru, sru_reference


def step(form, inputs):
    def run():
        for tensor in inputs:
            tensor.grad = None
        outputs, _ = form(*inputs)
        outputs.backward(torch.ones_like(outputs))

    return run


def main():
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    shape = args.length, args.streams, args.width
    per_unit, state = (2, args.width), shape[1:]
    print(f"{describe_machine()}; {args.length} x {args.streams} x {args.width}, float32")

    def inputs(*shapes):
        return [torch.randn(size, requires_grad=True) for size in shapes]

    print("\nSRU\n")
    tensors = inputs((*shape[:2], 3, args.width), shape, per_unit, per_unit, state)
    cases = {"ours": step(sru, tensors), "plain loop": step(sru_reference, tensors)}
    compare(cases, args.repeats, baseline="ours")
    print("\ngated linear recurrence\n")
    tensors = [torch.rand(shape, requires_grad=True), *inputs(shape, state)]
    cases = {
        "ours": step(linear_recurrence, tensors),
        "plain loop": step(linear_recurrence_reference, tensors),
    }
    compare(cases, args.repeats, baseline="ours")


if __name__ == "__main__":
    main()
