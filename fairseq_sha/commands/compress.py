"""Compress files with a trained model and arithmetic coding.

    fairseq-sha compress --path checkpoint.pt FILE...

Writes FILE.shac for each file. fairseq-sha decompress restores the files, bit for bit. It needs the
same checkpoint, machine, installation, and --cpu or not, because the last digit of a probability
decides, and that is not the same everywhere. A file is cut into streams that are read side by side.
More streams are faster and compress worse: each begins without knowing what came before it.

A file that cannot be compressed is named, the others are compressed, and the exit status is 1.
"""

import sys
import traceback
from pathlib import Path

from fairseq_sha.commands.common import add_model_arguments, check_new, load_model
from fairseq_sha.errors import UserError, wants_traceback
from fairseq_sha.files import write_atomically

SUFFIX = ".shac"


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--streams", type=int, help="streams per file (default: one for each 32 KB, at most 64)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def run(args):
    """Compress the files; returns the exit status."""
    from fairseq_sha import compression

    compression.check_numbers(args.streams, args.threads)
    compression.check_packages()
    ready = for_each(args.files, lambda path: check_files(path, packed_path(path)))
    if not ready:
        return 1
    model = load_model(args)
    compression.check_codec(model)

    def compress(path):
        check_new([packed_path(path)])
        data = path.read_bytes()
        packed = compression.compress(model, data, args.streams, args.threads, progress=True)
        write_atomically(packed_path(path), packed)
        rate = f", {8 * len(packed) / len(data):.3f} bits per byte" if data else ""
        print(f"{path}: {len(data):,} to {len(packed):,} bytes{rate}")

    return int(len(for_each(ready, compress)) < len(args.files))


def packed_path(path):
    return path.with_name(path.name + SUFFIX)


def check_files(source, target):
    """Check before the work that one file can be read and the other can be written.

    Raises:
        OSError, UserError: they cannot
    """
    with open(source, "rb"):
        pass
    check_new([target])


def for_each(paths, function):
    """Call a function for each path. An error is shown, and the others are still done.

    Args:
        paths (list of Path): files
        function (callable): takes a path; the message of its UserError names the file

    Returns:
        list of Path: those without error
    """
    done = []
    for path in paths:
        try:
            function(path)
            done.append(path)
        except BrokenPipeError:  # of standard output, not of a file
            raise
        except (UserError, OSError) as error:
            if wants_traceback():
                traceback.print_exc()
            named = isinstance(error, UserError) or error.filename is None
            message = error if named else f"{error.filename}: {error.strerror}"
            print(f"error: {message}", file=sys.stderr)
    return done
