"""Compress a split of a data folder with classical compressors: what a model has to beat.

    fairseq-sha rivals data-bin/enwiki6
    fairseq-sha rivals data-bin/enwiki6 --prime 0 --only ppmd-i zpaq

Each compressor is measured alone, and primed with text of train: what the split adds to the
compressed size of that text, in bits per byte of the split. The data folder may be one of bytes or
of pieces. ZPAQ takes 2 to 3 seconds per MB, and most others less; --cache FILE remembers what was
measured.

    fairseq-sha rivals data-bin/enwiki6 --path MODEL

adds a model. What it packs and the size of its file count where compressors are alone; after train,
only what it packs counts, however much of train the model has read.
"""

import argparse
import json
import sys
from pathlib import Path

from fairseq_sha.commands.common import add_model_arguments, check_new, load_coder, progress_bar
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--prime",
        nargs="+",
        type=count,
        default=["all"],
        metavar="N",
        help="how many bytes of train to prime with, or all; 0 for none (default: all)",
    )
    parser.add_argument(
        "--streams",
        type=int,
        default=1,
        help="prime with the N bytes that a model reads first in so many streams, which is the "
        "beginning of each (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these compressors (default: all)"
    )
    add_model_arguments(parser, required=False, what="MODEL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="file that remembers sizes for the next time"
    )


def count(text):
    """A number of bytes, or ``all``."""
    if text == "all":
        return text
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of bytes nor all")


def run(args):
    """Measure and print the table."""
    from fairseq_sha.compare import compressors, texts

    if args.json:
        check_new([args.json])
    missing = compressors.missing(args.only)
    if not any(compressor.installed for compressor in compressors.chosen(args.only)):
        raise UserError(missing)
    coder = load_coder(args) if args.path else None
    train, text = (texts.read_text(args.data, split) for split in ("train", args.split))
    rows = compressors.rows(
        train,
        text,
        [0, *(len(train) if n == "all" else n for n in args.prime)],
        cache=args.cache,
        only=args.only,
        streams=args.streams,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if coder:
        primed_with = max(row["primed_with"] for row in rows)
        with progress_bar(Path(args.path).name, len(text)) as bar:
            rows += compressors.rows_of_model(args.path, coder, text, primed_with, bar.update)
    print(compressors.table(rows, len(train)))
    print(
        f"{args.split}: {len(text):,} bytes. Seconds are those to compress the text before it too."
    )
    if coder:
        print("A model: alone with the size of its file, after train without it.")
    if missing:
        print(missing, file=sys.stderr)
    if args.json:
        write_atomically(args.json, json.dumps(rows) + "\n")
