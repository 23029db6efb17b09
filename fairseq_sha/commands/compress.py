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

import argparse
import contextlib
import shutil
import sys
import traceback
from pathlib import Path

from fairseq_sha import packed_file
from fairseq_sha.commands.common import add_model_arguments, check_new, load_coder, progress_bar
from fairseq_sha.errors import UserError, wants_traceback
from fairseq_sha.files import unfinished

SUFFIX = ".shac"
STANDARD = Path("-")
ERROR, WARNING = 1, 2


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
        help="of the original, such as 512K (default: 4M)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, with a checkpoint (default: %(default)s)"
    )
    add_file_arguments(parser, "FILE")


def add_file_arguments(parser, name):
    """Declare the options about files, those of gzip."""
    parser.add_argument(
        "-c", "--stdout", action="store_true", help="write to standard output, and no other file"
    )
    parser.add_argument("-f", "--force", action="store_true", help="write over existing files")
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        default=[STANDARD],
        metavar=name,
        help="- or none: standard input, to standard output",
    )


def byte_count(text):
    """A number of bytes; K, M or G after it stands for a power of 1024."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not (number.isdigit() and number.isascii()) or unit not in ("", "K", "M", "G"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 4096 or 4M")
    return int(number) << 10 * "_KMG".find(unit) if unit else int(number)


def run(args):
    """Compress the files; returns the exit status."""
    packed_file.check_numbers(args.block_size, args.streams, args.threads)
    if args.stdout and len(args.files) > 1:
        raise UserError("--stdout: packed files cannot be joined; name one file")
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


class Skipped(UserError):
    """A file that is left alone, which is a warning."""


def check_source(path):
    """Check before the work that a file can be read.

    Raises:
        OSError, UserError: it cannot
    """
    if path.is_dir():
        raise Skipped(f"{path}: is a folder; name the files in it")
    if path != STANDARD:
        with open(path, "rb"):
            pass


def target_of(args, source, path):
    """Where the output for a file goes: ``path``, or None for standard output.

    Raises:
        UserError: it cannot be written
    """
    if args.stdout or source == STANDARD:
        return None
    if not path.exists():
        check_new([path])
    elif path.is_dir():
        raise Skipped(f"{path}: exists already, and is a folder; move it away")
    elif not args.force:
        raise Skipped(f"{path}: exists already; move it away, or use --force")
    return path


def opened(path):
    """A file to read, as a context."""
    return contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD else open(path, "rb")


@contextlib.contextmanager
def writing(source, target):
    """Yield a file that takes the place of ``target`` at the end, readable by whoever may read
    ``source``; standard output if ``target`` is None."""
    if target is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with unfinished(target) as temporary:
        with open(temporary, "wb") as output:
            shutil.copymode(source, temporary)
            yield output


def for_each(paths, function):
    """Call a function for each path. An error is shown, and the others are still done.

    Args:
        paths (list of Path): files
        function (callable): takes a path; the message of its UserError names the file. May return
            an exit status

    Returns:
        the paths without error, and the exit status
    """
    done, status = [], 0
    for path in paths:
        try:
            status = worst(status, function(path) or 0)
            done.append(path)
        except BrokenPipeError:  # of standard output, not of a file
            raise
        except (UserError, OSError) as error:
            if wants_traceback():
                traceback.print_exc()
            message = error
            if isinstance(error, OSError):
                message = f"{error.filename or path}: {error.strerror or error}"
            skipped = isinstance(error, Skipped)
            print(f"{'warning' if skipped else 'error'}: {message}", file=sys.stderr)
            status = worst(status, WARNING if skipped else ERROR)
    return done, status


def worst(*statuses):
    """The exit status of a command that did several things: that of an error, or of a warning."""
    return ERROR if ERROR in statuses else max(statuses)
