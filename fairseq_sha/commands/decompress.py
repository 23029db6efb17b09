"""Bring back files that fairseq_sha.commands.compress packed.

    fairseq-sha decompress --path checkpoint.pt FILE.shac...

Writes each FILE without the suffix. What cannot be brought back bit for bit is not written.
"""

import sys
from pathlib import Path

from fairseq_sha.commands.common import check_new, load, model_parser, write
from fairseq_sha.commands.compress import SUFFIX, decompress, read_header
from fairseq_sha.errors import UserError


def main(argv=None):
    parser = model_parser("decompress", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar=f"FILE{SUFFIX}")
    args = parser.parse_args(argv)
    for path in args.files:
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: does not end in {SUFFIX}; name what was compressed")
    contents = [(path.with_suffix(""), path.read_bytes()) for path in args.files]
    check_new(path for path, _ in contents)
    model = load(args)
    for path, packed in contents:  # before hours of work
        named(path, read_header, model, packed)
    for path, packed in contents:
        data = named(path, decompress, model, packed, progress=True)
        write(path, data)
        print(f"{path}{SUFFIX}: {len(packed):,} to {len(data):,} bytes")


def named(path, function, *args, **kwargs):
    """Call a function; a UserError then names the file."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{path}{SUFFIX}: {error}")


if __name__ == "__main__":
    sys.exit(main())
