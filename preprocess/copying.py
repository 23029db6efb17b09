r"""Make the data-bin folder of selective copying, a synthetic task (used in arXiv 2410.01201).

Each line holds letters at random places among dots, a slash, and the same letters in order:

    ..c.....a....fa...../cafa

To predict what follows the slash, a model must have kept the letters and ignored the dots. All
else in a line is random, except that most of it is dots; so judge a model by the answers alone:

    python preprocess/copying.py --dest data-bin/copying
    fairseq-sha evaluate data-bin/copying --path CHECKPOINT --answers-after / ...

The paper has 4,096 tokens and 16 letters (--length 4096); the default is shorter, for a CPU. A
split begins with an empty line, and has LENGTH + LETTERS + 2 bytes for each further one. So with
segments of this size, and a number of lines that is a multiple of the number of streams, each
segment is a line. The same options and seed give the same files.
"""

import string
import tempfile

import numpy as np

from fairseq_sha.data import data_bin

NOISE, MARK = b".", b"/"
LINES = {"train": 20_000, "valid": 192, "test": 192}  # multiples of 16, or of 8 streams
PART = 1000  # lines that are made at once


def main(argv=None):
    args = parse(argv)
    dest = data_bin.checked_dest(args.dest)
    with tempfile.TemporaryFile() as file:
        splits = []
        for number, name in enumerate(LINES):
            start = file.tell()
            file.write(b"\n")
            random = np.random.RandomState([args.seed, number])
            for count in parts(getattr(args, name)):
                file.write(lines(random, count, args.length, args.letters, args.alphabet))
            splits.append(data_bin.Split(name, file, "the text", start, file.tell() - start))
        data_bin.convert_splits(splits, dest)
    print(f"tokens of a line: {args.length + args.letters + 2:,}")


def parse(argv):
    parser = data_bin.argument_parser(__doc__, all_bytes=False)
    options = {
        "length": (256, "dots and letters of a line before the slash"),
        "letters": (16, "letters of a line"),
        "alphabet": (16, "different letters, at most 26"),
        **{name: (lines, f"lines of {name}") for name, lines in LINES.items()},
        "seed": (1, "of the random numbers"),
    }
    for name, (default, text) in options.items():
        parser.add_argument(
            f"--{name}",
            type=data_bin.positive,
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    args = parser.parse_args(argv)
    if args.letters > args.length:
        parser.error(f"--letters {args.letters}: a line has {args.length} places; use less")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: must be less than 2^32")
    if args.alphabet > len(string.ascii_lowercase):
        parser.error(f"--alphabet {args.alphabet}: there are 26 letters; use less")
    return args


def parts(count):
    """Numbers of lines, at most ``PART`` each, that make ``count``."""
    return [PART] * (count // PART) + [count % PART]


def lines(random, count, length, letters, alphabet):
    """Random lines.

    Args:
        random (numpy.random.RandomState): where they come from
        count (int): of lines
        length (int): of what comes before the slash
        letters (int): of each line
        alphabet (int): different letters

    Returns:
        bytes
    """
    values = random.randint(alphabet, size=(count, letters)).astype(np.uint8) + ord("a")
    # The places of the smallest of random numbers are a sample without replacement.
    places = np.sort(random.random_sample((count, length)).argpartition(letters - 1)[:, :letters])
    out = np.full((count, length + letters + 2), ord(NOISE), dtype=np.uint8)
    np.put_along_axis(out, places, values, axis=1)
    out[:, length] = ord(MARK)
    out[:, length + 1 : -1] = values
    out[:, -1] = data_bin.NEWLINE
    return out.tobytes()


if __name__ == "__main__":
    data_bin.run(main)
