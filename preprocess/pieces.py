r"""Turn any file into a data-bin folder for training on pieces of words (byte-level BPE).

The last part of the file becomes the test split, the part before it the valid split, and the rest
train. The pieces are learned from train alone. The 256 bytes are pieces, so every file can be cut
into pieces and comes back byte for byte. No piece goes on from one word to the next, and the
newline is fairseq's </s>.

    pip install 'fairseq-sha[pieces]'
    python preprocess/pieces.py --input FILE --vocabulary 8000 --dest data-bin/NAME
    python preprocess/pieces.py --input FILE --vocabulary 1000 --dest data-bin/NAME \
        --valid-bytes 5000 --test-bytes 5000

Train with --task segment_language_modeling --codec pieces.
"""

import argparse

from bytes import add_sizes, check_sizes, held_out

from fairseq_sha.data import data_bin, piece_data_bin, pieces

VOCABULARY = 8000  # number of pieces


def main(argv=None):
    parser = data_bin.argument_parser(__doc__, all_bytes=False)
    parser.add_argument("--input", required=True, help="file of any bytes")
    add_sizes(parser)
    add_vocabulary(parser)
    args = parser.parse_args(argv)
    check_sizes(parser, args)
    pieces.check_package()
    dest = data_bin.checked_dest(args.dest)
    with data_bin.open_input(args.input) as stream:
        valid, test = held_out(args, stream.seek(0, 2))
        piece_data_bin.convert(stream, args.input, dest, valid, test, args.vocabulary or VOCABULARY)


def add_vocabulary(parser):
    """Add the option for the number of pieces."""
    parser.add_argument(
        "--vocabulary",
        type=vocabulary,
        metavar="N",
        help=f"number of pieces, the 256 bytes included (default: {VOCABULARY})",
    )


def vocabulary(text):
    if not text.isdigit() or not pieces.MINIMUM <= int(text) <= pieces.MAXIMUM:
        limits = f"from {pieces.MINIMUM} (the bytes) to {pieces.MAXIMUM:,}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
    return int(text)


if __name__ == "__main__":
    data_bin.run(main)
