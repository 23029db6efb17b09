"""What compress and decompress share: files, options and exit statuses as gzip has them."""

import argparse
import contextlib
import os
import sys
import traceback

from fairseq_sha.commands.common import STANDARD, check_new, path_or_standard, standard_output
from fairseq_sha.errors import UserError, wants_traceback
from fairseq_sha.files import unfinished

SUFFIX = ".shac"
ERROR, WARNING = 1, 2


def add_file_arguments(parser, name):
    """Declare the options about files, those of gzip."""
    parser.add_argument(
        "-c", "--stdout", action="store_true", help="write to standard output, and no other file"
    )
    parser.add_argument("-f", "--force", action="store_true", help="write over existing files")
    parser.add_argument(
        "files",
        nargs="*",
        type=path_or_standard,
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


class Skipped(UserError):
    """A file that is left alone, which is a warning."""


def check_source(path):
    """Check before the work that a file can be read.

    Raises:
        OSError, UserError: it cannot
    """
    if path.is_dir():
        raise Skipped(f"{path}: is a folder; name the files in it")
    if path != STANDARD and not path.is_fifo():  # whose writer would see its reader go away
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
    """Yield a file that takes the place of ``target`` at the end, with the permissions and the time
    of ``source``; standard output if ``target`` is None."""
    if target is None:
        with standard_output() as output:
            yield output
        return
    found = os.stat(source)
    with unfinished(target) as temporary:
        temporary.chmod(0o600)
        with open(temporary, "wb") as output:
            yield output
        mode = found.st_mode & 0o777
        try:
            os.chown(temporary, found.st_uid if os.geteuid() == 0 else -1, found.st_gid)
        except PermissionError:  # of a group that the user does not belong to
            mode &= ~0o070
        temporary.chmod(mode)
        os.utime(temporary, ns=(found.st_atime_ns, found.st_mtime_ns))


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
