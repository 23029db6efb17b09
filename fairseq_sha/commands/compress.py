"""Compress files with a trained model and arithmetic coding.

    fairseq-sha compress --path MODEL FILE...
    fairseq-sha compress --path MODEL < FILE > FILE.shac

Writes FILE.shac for each file, and keeps FILE. fairseq-sha decompress restores the files, bit for
bit. MODEL is a portable model, which fairseq-sha quantize writes, or a checkpoint. What a portable
model packs can be restored on any machine that has the same model. A checkpoint needs the same
machine, installation, and --cpu or not, because the last digit of a probability decides, and that
is not the same everywhere.

A file is cut into blocks, and blocks into streams that are read side by side. More streams are
faster and compress worse: each begins without knowing what came before it. Damage to a packed file
costs the blocks that it hits. One block at a time is in memory.

A file that cannot be compressed is named, and the others are compressed. The exit status is that of
gzip: 0 if all went well, 1 after an error, 2 after a warning, such as for a file that was skipped.
"""

import sys

from fairseq_sha import packed_file
from fairseq_sha.commands.common import add_model_arguments, load_coder, progress_bar
from fairseq_sha.commands.gzip_conventions import (
    STANDARD,
    SUFFIX,
    Skipped,
    add_file_arguments,
    byte_count,
    check_source,
    for_each,
    opened,
    target_of,
    worst,
    writing,
)
from fairseq_sha.errors import UserError


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser, what="MODEL")
    parser.add_argument(
        "--streams",
        type=int,
        help="streams per block (default: one for each 32 KiB, at most 64)",
    )
    parser.add_argument(
        "--block-size",
        type=byte_count,
        default=packed_file.BLOCK_SIZE,
        metavar="BYTES",
        help="of the original, such as 512K (default: 4M); to unpack needs four times as much "
        "memory",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, with a checkpoint (default: %(default)s)"
    )
    add_file_arguments(parser, "FILE")


def run(args):
    """Compress the files; returns the exit status."""
    packed_file.check_numbers(args.block_size, args.streams, args.threads)
    if (len(args.files) if args.stdout else args.files.count(STANDARD)) > 1:
        raise UserError("packed files cannot be joined on standard output; name one file")
    to_stdout = args.stdout or STANDARD in args.files
    if to_stdout and sys.stdout.isatty() and not args.force:
        raise UserError("packed data is not written to a terminal; redirect it, or use --force")

    def check(path):
        check_source(path)
        if path.suffix == SUFFIX and not args.force:
            raise Skipped(f"{path}: ends in {SUFFIX} already; --force packs it again")
        target_of(args, path, packed_path(path))

    ready, status = for_each(args.files, check)
    if not ready:
        return status
    coder = load_coder(args, args.threads)

    def compress(path):
        target = target_of(args, path, packed_path(path))
        total = None if path == STANDARD else path.stat().st_size
        with opened(path) as source, writing(path, target) as output:
            with progress_bar(path.name, total) as bar:
                sizes = packed_file.pack(
                    coder, source, output, args.block_size, args.streams, bar.update
                )
        if not to_stdout:
            original, packed = sizes
            rate = f", {8 * packed / original:.3f} bits per byte" if original else ""
            print(f"{path}: {original:,} to {packed:,} bytes{rate}")

    return worst(status, for_each(ready, compress)[1])


def packed_path(path):
    return path.with_name(path.name + SUFFIX)
