"""Make the data-bin folder of enwiki6, a small corpus for experiments.

enwiki6 is 6,089,746 bytes of English Wikipedia in XML, the format of enwik8. It is test data of the
Python package gensim, so pip can download it; no code of gensim is run:

    pip install --no-deps gensim==4.4.0
    python preprocess/enwiki6.py --dest data-bin/enwiki6

valid and test are the last two twentieths (304,487 bytes each). Train contains all 201 byte values
that occur.
"""

import bz2
import importlib.util
import os

from fairseq_sha.data import data_bin, known_corpora
from fairseq_sha.errors import UserError

ENWIKI6 = known_corpora.KnownCorpus(
    name="enwiki6",
    size=6_089_746,
    sha1="9b2a2d55a751a1449c04d584d4711b62bf35b588",
    valid=304_487,
    test=304_487,
)
FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
INSTALL = "run 'pip install --no-deps gensim==4.4.0' or give --input"
REINSTALL = "run 'pip install --no-deps --force-reinstall gensim==4.4.0' and run again"


def main(argv=None, known=ENWIKI6):
    parser = data_bin.argument_parser(__doc__)
    parser.add_argument(
        "--input",
        type=data_bin.file_name,
        help=f"{FILE} (default: the one in the installed gensim)",
    )
    args = parser.parse_args(argv)
    dest = data_bin.checked_dest(args.dest)
    path = args.input or find()
    remedy = "give another --input" if args.input else REINSTALL
    with data_bin.open_input(path) as file, bz2.open(file) as packed:
        unpacked = known_corpora.unpack(packed, path, known, remedy)
    known_corpora.convert(unpacked, path, known, remedy, dest, args.all_bytes)


def find():
    """The path of gensim's file. UserError: gensim is not installed or lacks the file."""
    # Find the package without importing it: that would need packages that we do not install.
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"enwiki6 comes from gensim, which is not installed; {INSTALL}")
    path = os.path.join(spec.submodule_search_locations[0], "test", "test_data", FILE)
    if not os.path.exists(path):
        raise UserError(f"the installed gensim has no {path}; {INSTALL}")
    return path


if __name__ == "__main__":
    data_bin.run(main)
