"""preprocess/enwiki6.py: the small corpus that gensim carries."""

import bz2
import hashlib
import os
from pathlib import Path

import enwiki6
import pytest

from fairseq_sha.data import known_corpora
from fairseq_sha.errors import UserError

from .helpers import read_back

try:
    PATH = enwiki6.find()
except UserError as error:
    PATH, REASON = (
        None,
        f"needs the Wikipedia that gensim carries, as under make test: {error}",
    )
else:
    REASON = ""
needs_gensim = pytest.mark.skipif(PATH is None, reason=REASON)

CORPUS = b"<page>\n" * 1000
FAKE = ("enwiki6", len(CORPUS), hashlib.sha1(CORPUS).hexdigest(), 350, 350)
CODE = (
    "import enwiki6\nfrom fairseq_sha.data import data_bin, known_corpora\n"
    f"data_bin.run(lambda: enwiki6.main(known=known_corpora.KnownCorpus(*{FAKE})))\n"
)


def main(argv):
    enwiki6.main(argv, known=known_corpora.KnownCorpus(*FAKE))


@needs_gensim
def test_the_real_corpus(runner):
    done = runner.script("enwiki6", "--dest", "out")
    assert done.returncode == 0, done.stderr
    assert "dictionary: 208 symbols, 201 of them bytes" in done.stdout
    splits = [b"".join(lines) for lines in read_back(runner.folder / "out")]
    assert b"".join(splits) == bz2.decompress(Path(PATH).read_bytes())
    assert [len(split) for split in splits] == [5_480_772, 304_487, 304_487]
    assert len(set(splits[0])) == 201


def test_held_out_is_a_twentieth():
    assert enwiki6.ENWIKI6.size // 20 == enwiki6.ENWIKI6.valid == enwiki6.ENWIKI6.test


def test_input(runner):
    done = runner.code(CODE, "--dest", "out", "--input", runner.write(bz2.compress(CORPUS)))
    assert done.returncode == 0, done.stderr
    splits = [b"".join(lines) for lines in read_back(runner.folder / "out")]
    assert b"".join(splits) == CORPUS


@pytest.mark.parametrize(
    "data, words",
    [
        (bz2.compress(CORPUS)[:-20], "damaged"),
        (b"not bz2 at all", "damaged"),
        (b"", "damaged"),
        (bz2.compress(CORPUS[:-1]), "6,999 bytes"),
        (bz2.compress(CORPUS + b"x" * 9_000_000), "more bytes"),
        (bz2.compress(CORPUS[:-1] + b"x"), "SHA-1"),
    ],
)
def test_wrong_input(runner, data, words):
    argv = ["--dest", "out", "--input", runner.write(data)]
    runner.check_user_error(main, argv, "input", words, "give another --input")


def test_without_gensim(runner):
    code = (
        "import importlib.util, enwiki6\n"
        "from fairseq_sha.data import data_bin\n"
        "importlib.util.find_spec = lambda name: None\n"
        "data_bin.run(enwiki6.main)\n"
    )
    done = runner.code(code, "--dest", "out")
    runner.check_error(done, "pip install --no-deps gensim==4.4.0", files=[])


def test_gensim_without_the_file(runner):
    (runner.folder / "gensim").mkdir()
    (runner.folder / "gensim" / "__init__.py").write_text("raise Exception('gensim was run')")
    code = "import sys; sys.path.insert(0, '.')\n" + CODE
    done = runner.code(code, "--dest", "out")
    runner.check_error(done, "pip install --no-deps gensim==4.4.0", "has no", files=["gensim"])


def test_gensim_is_found_and_not_run(runner):
    folder = runner.folder / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    (runner.folder / "gensim" / "__init__.py").write_text("raise Exception('gensim was run')")
    (folder / enwiki6.FILE).write_bytes(bz2.compress(CORPUS))
    code = "import sys; sys.path.insert(0, '.')\n" + CODE
    done = runner.code(code, "--dest", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(str(runner.folder))) == ["gensim", "out"]
