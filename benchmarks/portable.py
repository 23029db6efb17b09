"""Speed of the integer form beside the float model, a byte at a time, with 1 and 64 streams.

Each predicts the same bytes of valid: the float model only predicts, the integer form predicts and
codes. Generation is one stream. Converting and compiling are not counted.

    python benchmarks/portable.py --path checkpoint.pt --data data-bin/enwiki6
"""

import torch
from timing import arguments, compare, describe_machine

from fairseq_sha.portable import PortableModel, convert, model
from fairseq_sha.trained_model import TrainedModel

STREAMS = (1, 64)


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--path", required=True, help="checkpoint with an integer form")
    parser.add_argument("--data", required=True, help="its data folder")
    parser.add_argument("--steps", type=int, default=600, help="bytes of each stream")
    parser.set_defaults(threads=1, repeats=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    trained = TrainedModel.load(args.path, args.data, cpu=True)
    convert.check(trained)
    sample = convert.columns(trained, convert.text_of(trained, "train", 16384), 16)
    sizes, arrays = convert.convert(trained, sample)
    ours = PortableModel(model.unpack(model.pack(sizes, arrays), "the model"))
    text = convert.text_of(trained, "valid", max(STREAMS) * args.steps)
    print(describe_machine())
    for streams in STREAMS:
        data = text[: streams * args.steps]
        parts = [data[i * args.steps : (i + 1) * args.steps] for i in range(streams)]
        packed = ours.encode(data, streams)
        cases = {
            "float, predict": lambda parts=parts: convert.float_bits(trained, parts),
            "integers, pack": lambda d=data, n=streams: ours.encode(d, n),
            "integers, unpack": lambda p=packed, d=data, n=streams: ours.decode(p, len(d), n),
        }
        if streams == 1:
            cases["integers, generate"] = lambda: ours.generate(b"", args.steps, 1)
        print(f"\n{streams} streams, {len(data):,} bytes\n")
        medians = compare(cases, args.repeats, "float, predict")
        print()
        for name, milliseconds in medians.items():
            print(f"* {name}: {1e3 * len(data) / milliseconds:,.0f} bytes/s")


if __name__ == "__main__":
    main()
