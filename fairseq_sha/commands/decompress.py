"""Restore files that fairseq-sha compress packed.

    fairseq-sha decompress --path checkpoint.pt FILE.shac...

Writes FILE for each FILE.shac. A file that cannot be restored bit for bit is not written: it is
named, the others are restored, and the exit status is 1.
"""

from pathlib import Path

from fairseq_sha.commands.common import add_model_arguments, check_new, load_model
from fairseq_sha.commands.compress import SUFFIX, check_files, for_each
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar=f"FILE{SUFFIX}")


def run(args):
    """Restore the files; returns the exit status."""
    from fairseq_sha import compression

    compression.check_packages()
    ready = for_each(args.files, check)
    if not ready:
        return 1
    model = load_model(args)
    compression.check_codec(model)

    def decompress(path):
        check_new([path.with_suffix("")])
        packed = path.read_bytes()
        try:
            data = compression.decompress(model, packed, progress=True)
        except UserError as error:
            raise UserError(f"{path}: {error}")
        write_atomically(path.with_suffix(""), data)
        print(f"{path}: {len(packed):,} to {len(data):,} bytes")

    return int(len(for_each(ready, decompress)) < len(args.files))


def check(path):
    """Check before the work that a packed file can be read and its content can be written.

    Raises:
        OSError, UserError: they cannot
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: does not end in {SUFFIX}; name a compressed file")
    check_files(path, path.with_suffix(""))
