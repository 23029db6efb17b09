"""Make the data-bin folder of enwik8, the first 100,000,000 bytes of an English Wikipedia dump.

The split is the usual one: the first 90 million bytes are train, the next 5 million valid, the last
5 million test. Size and SHA-1 of the corpus are checked.

    python preprocess/enwik8.py --dest data-bin/enwik8

downloads enwik8.zip (36 MB) to data-bin/enwik8.zip, unless that file exists. An interrupted
download continues where it stopped when the command is run again.

    python preprocess/enwik8.py --dest data-bin/enwik8 --input enwik8.zip

uses a file that you have, zipped or not.
"""

import contextlib
import zipfile

from fairseq_sha.data import data_bin, downloads, known_corpora
from fairseq_sha.errors import UserError

ENWIK8 = known_corpora.KnownCorpus(
    name="enwik8",
    size=100_000_000,
    sha1="57b8363b814821dc9d47aa4d41f58733519076b2",
    valid=5_000_000,
    test=5_000_000,
)
URL = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_MAGIC = b"PK\x03\x04"


def main(argv=None, known=ENWIK8):
    parser = data_bin.argument_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input", type=data_bin.file_name, help="enwik8 or enwik8.zip (default: download it)"
    )
    source.add_argument("--url", default=URL, help="where to download from (default: %(default)s)")
    args = parser.parse_args(argv)
    dest = data_bin.checked_dest(args.dest)
    path = args.input or downloads.download(args.url, dest.with_name("enwik8.zip"))
    remedy = "give another --input" if args.input else "delete it and run again"
    with data_bin.open_input(path) as file, unzipped(file, path, known, remedy) as stream:
        known_corpora.convert(stream, path, known, remedy, dest, args.all_bytes)


@contextlib.contextmanager
def unzipped(file, path, known, remedy):
    """Yield the content of ``file``: its only member if it is a zip, the file itself if not."""
    magic = file.read(len(ZIP_MAGIC))
    file.seek(0)
    # zipfile.is_zipfile would not recognise a truncated zip.
    if magic != ZIP_MAGIC:
        yield file
        return
    try:
        archive = zipfile.ZipFile(file)
        (member,) = archive.namelist()
        packed = archive.open(member)
    except ValueError:
        raise UserError(f"{path} does not hold exactly one file; {remedy}") from None
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise known_corpora.damaged(path, error, remedy) from error
    with archive, packed:
        yield known_corpora.unpack(packed, path, known, remedy)


if __name__ == "__main__":
    data_bin.run(main)
