"""Make the data-bin folder of enwiki6, a small corpus for trying things out.

enwiki6 is 6,089,746 bytes of English Wikipedia in XML, the format of enwik8. The Python package
gensim carries it as test data, so it comes from PyPI and nothing of gensim is run:

    pip install --no-deps gensim==4.4.0
    python preprocess/enwiki6.py --dest data-bin/enwiki6

valid and test are a twentieth each (304,487 bytes), at the end. All 201 byte values that occur
do so in train.
"""

import bz2
import importlib.util
import os

import corpus
import data_bin
from data_bin import UserError

ENWIKI6 = corpus.Corpus(
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
    parser.add_argument("--input", help=f"{FILE} (default: the one in the installed gensim)")
    args = parser.parse_args(argv)
    dest = data_bin.checked_dest(args.dest)
    path = args.input or find()
    remedy = "give another --input" if args.input else REINSTALL
    with data_bin.open_input(path) as file, bz2.open(file) as packed:
        unpacked = corpus.unpack(packed, path, known, remedy)
    corpus.convert(unpacked, path, known, remedy, dest, args.all_bytes)


def find():
    """The path of gensim's file. UserError: there is no gensim, or it lacks the file."""
    # Locates the package without running it: importing gensim needs packages we do without.
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"enwiki6 comes from gensim, which is not installed; {INSTALL}")
    path = os.path.join(spec.submodule_search_locations[0], "test", "test_data", FILE)
    if not os.path.exists(path):
        raise UserError(f"the installed gensim has no {path}; {INSTALL}")
    return path


if __name__ == "__main__":
    data_bin.run(main)
