r"""Turn any file into a data-bin folder for training on its bytes.

The last part of the file becomes the test split, the part before it the valid split, and the rest
train. Nothing is tokenized or normalised: one byte is one token, and the newline byte is fairseq's
</s>.

    python preprocess/bytes.py --input FILE --dest data-bin/NAME
    python preprocess/bytes.py --input FILE --dest data-bin/NAME --valid-bytes 5000 \
        --test-bytes 5000
"""

import argparse
from fractions import Fraction

from fairseq_sha.data import data_bin

DEFAULT_PERCENT = Fraction(5)


def main(argv=None):
    args = parse(argv)
    dest = data_bin.checked_dest(args.dest)
    with data_bin.open_input(args.input) as stream:
        valid, test = held_out(args, stream.seek(0, 2))
        data_bin.convert(stream, args.input, dest, valid, test, args.all_bytes)


def parse(argv):
    parser = data_bin.argument_parser(__doc__)
    parser.add_argument("--input", required=True, help="file of any bytes")
    add_sizes(parser)
    args = parser.parse_args(argv)
    check_sizes(parser, args)
    return args


def add_sizes(parser):
    """Add the options for the sizes of valid and test."""
    for split in ("valid", "test"):
        parser.add_argument(
            f"--{split}-percent",
            type=percent,
            metavar="P",
            help=f"size of {split} in percent of the file, rounded down (default 5)",
        )
        parser.add_argument(
            f"--{split}-bytes", type=number, metavar="N", help=f"size of {split} in bytes"
        )


def check_sizes(parser, args):
    """Exit with the parser's message if these options do not go together."""
    in_bytes = [args.valid_bytes is not None, args.test_bytes is not None]
    in_percent = [args.valid_percent is not None, args.test_percent is not None]
    if any(in_bytes) and any(in_percent):
        parser.error("give the sizes of valid and test both in bytes or both in percent")
    if any(in_bytes) and not all(in_bytes):
        parser.error("--valid-bytes and --test-bytes need each other")


def held_out(args, size):
    """Sizes of valid and test, in bytes, for a file of ``size`` bytes."""
    if args.valid_bytes is not None:
        return args.valid_bytes, args.test_bytes
    shares = (args.valid_percent, args.test_percent)
    # Fractions are exact; in binary floating point 32.3% of 1000 bytes would be 322.
    return tuple(int(size * (DEFAULT_PERCENT if p is None else p) / 100) for p in shares)


def percent(text):
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100")
    return value


def number(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


if __name__ == "__main__":
    data_bin.run(main)
