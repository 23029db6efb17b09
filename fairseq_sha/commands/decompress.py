"""Restore files that fairseq-sha compress packed.

    fairseq-sha decompress --path MODEL FILE.shac...
    fairseq-sha decompress --path MODEL < FILE.shac > FILE

Writes FILE for each FILE.shac, and keeps FILE.shac. MODEL is what packed the files. A file that
cannot be restored bit for bit is named, with the blocks that are damaged, and is not written; the
others are restored. --recover writes what is left of it, without the blocks that are damaged.
Standard output gets each block as soon as it is restored.

The exit status is that of gzip: 0 if all went well, 1 after an error or if anything is damaged, 2
after a warning, such as for a file that was skipped, or that another installation packed.
"""

import os
import sys

from fairseq_sha import packed_file
from fairseq_sha.commands.common import add_model_arguments, load_coder, progress_bar
from fairseq_sha.commands.gzip_conventions import (
    ERROR,
    STANDARD,
    SUFFIX,
    WARNING,
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

MOST_LISTED = 5


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser, what="MODEL")
    parser.add_argument(
        "-t", "--test", action="store_true", help="unpack and check the files, and write nothing"
    )
    parser.add_argument(
        "--recover", action="store_true", help="write what can be restored of a damaged file"
    )
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        default=packed_file.MEMORY_LIMIT,
        metavar="BYTES",
        help="refuse files whose blocks may need more memory, the model not counted (default: 1G)",
    )
    add_file_arguments(parser, f"FILE{SUFFIX}")


def run(args):
    """Restore the files; returns the exit status."""
    if STANDARD in args.files and sys.stdin.isatty():
        raise UserError("packed data is not read from a terminal; redirect it, or name a file")

    def target(path):
        return None if args.test else target_of(args, path, path.with_suffix(""))

    def check(path):
        check_source(path)
        to_stdout = args.stdout or path == STANDARD
        if path.suffix != SUFFIX and not (to_stdout or args.test):
            raise Skipped(f"{path}: does not end in {SUFFIX}; rename it, or use --stdout")
        target(path)

    ready, status = for_each(args.files, check)
    if not ready:
        return status
    coder = load_coder(args)

    def decompress(path):
        name = "standard input" if path == STANDARD else path
        restored = target(path)
        with opened(path) as source:
            try:
                return _decompress(args, coder, source, path, restored, name)
            except UserError as error:
                raise UserError(f"{name}: {error}")

    return worst(status, for_each(ready, decompress)[1])


def _decompress(args, coder, source, path, target, name):
    """Restore one file.

    Args:
        args: the command's options
        coder (~fairseq_sha.packed_file.BlockCoder): what unpacks blocks
        source: the file, open
        path, target (Path): of the file, and of what to write, None for standard output
        name: of the file, for messages

    Returns:
        the exit status

    Raises:
        UserError: it cannot be restored, without its name
    """
    total, status = None, 0
    start = source.tell() if source.seekable() else None
    reader = packed_file.Reader(source, args.memory_limit)
    reader.check(coder)
    if reader.is_of_other_build(coder):
        print(
            f"warning: {name}: compressed with another installation or device: it may not be "
            "decodable",
            file=sys.stderr,
        )
        status = WARNING
    goes_on = args.recover or args.test
    if start is not None:
        # What is damaged is known before the work, which may take hours.
        total, damage = reader.survey()
        if damage and not goes_on:
            raise UserError(f"{_listed(damage)}; --recover writes what is left")
        source.seek(start)
        reader = packed_file.Reader(source, args.memory_limit)
    output = open(os.devnull, "wb") if args.test else writing(path, target)
    with output as file, progress_bar(path.name, total) as bar:
        (size, packed), damage = reader.unpack(coder, file, goes_on, bar.update)
        if damage and not size:
            raise UserError(f"{_listed(damage)}; nothing is left")
    for line in damage:
        print(f"error: {name}: {line}", file=sys.stderr)
    if args.test and not damage:
        print(f"{name}: {size:,} bytes, undamaged")
    elif target is not None:
        print(f"{path}: {packed:,} to {size:,} bytes")
    return ERROR if damage else status


def _listed(damage):
    more = f"; and {len(damage) - MOST_LISTED} more" if len(damage) > MOST_LISTED else ""
    return "; ".join(damage[:MOST_LISTED]) + more
