"""preprocess/pieces.py: a file becomes pieces that fairseq reads, and comes back."""

import hashlib
import json
import os
import random

import numpy as np
import pieces as pieces_script
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_sha.data import pieces
from fairseq_sha.data.codecs import PieceCodec
from fairseq_sha.data.corpus import Corpus
from tests.tiny_corpus import text

from .helpers import split_lines

TEXT = text(20000)
SPLITS = ("train", "valid", "test")


def convert(runner, data, valid, test, vocabulary, *options):
    sizes = ("--valid-bytes", valid, "--test-bytes", test, "--vocabulary", vocabulary)
    done = runner.script("pieces", "--input", runner.write(data), "--dest", "out", *sizes, *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return runner.folder / "out"


def read_back(folder):
    """The items of each split as fairseq reads them, as bytes."""
    from fairseq.data import Dictionary, MMapIndexedDataset

    codec = PieceCodec.load(str(folder))
    assert codec.dictionary == Dictionary.load(str(folder / "dict.txt"))
    assert len(codec.dictionary) % 8 == 0
    datasets = [MMapIndexedDataset(str(folder / split)) for split in SPLITS]
    return [[codec.decode(data[i]) for i in range(len(data))] for data in datasets]


CASES = {
    "text": (TEXT, 1500, 1501, 300),
    "no newline at all": (b"abcabcabcabc" * 20, 30, 30, 258),
    "nothing but newlines": (b"\n" * 9, 3, 2, 256),
    "splits begin within a character": ("\u00e9\u00e8\n".encode() * 40, 14, 11, 256),
    "no text": (b"\xff\xfe\r\n\x00\r\n\n   \xe2\x96\x81 \x85\xed\xa0\x80\n" * 9, 70, 33, 256),
    "bytes that train lacks": (b"ab\n" * 9 + b"xyz\x00\n" + b"\xf0", 3, 3, 256),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_round_trip(runner, case):
    data, valid, test, vocabulary = CASES[case]
    train = len(data) - valid - test
    folder = convert(runner, data, valid, test, vocabulary)
    parts = data[:train], data[train : train + valid], data[train + valid :]
    assert read_back(folder) == [split_lines(part) for part in parts]


def test_folder_has_the_pieces_that_the_codec_makes(runner):
    """Also where a line is longer than what is cut at once."""
    data = TEXT + b"\n" + b"the \xc3\xa9t\xc3\xa9 and " * 100000 + b"\n" + TEXT
    folder = convert(runner, data, 5000, 5000, 300)
    codec = PieceCodec.load(str(folder))
    train = Corpus(str(folder / "train"))
    assert codec.encode(data[:-10000]).tolist() == train.tokens.tolist()
    assert train.dtype == np.uint16 and train.total_tokens < len(data) / 2


def test_dictionary_is_sorted_by_how_often_pieces_occur_in_train(runner):
    folder = convert(runner, TEXT, 1500, 1501, 300)
    lines = [line.split() for line in (folder / "dict.txt").read_text("utf-8").splitlines()]
    tokens = Corpus(str(folder / "train")).tokens
    counts = np.bincount(tokens, minlength=4 + len(lines))
    assert [int(count) for _, count in lines] == counts[4:].tolist()
    found = [(symbol, int(count)) for symbol, count in lines if symbol[:4] != "made"]
    assert found == sorted(found, key=lambda pair: (-pair[1], pair[0])) and len(found) == 299


# SHA-1 of all files, with releases of the tokenizer that are years apart.
EXPECTED = "2e727cdc97b33ca734efbd32776e921806ba0600"


def test_same_input_gives_same_files(runner):
    rng = random.Random(1)  # the same in all versions of Python
    words = ["".join(rng.choices("abcdefg\u00e9.", k=rng.randrange(1, 6))) for _ in range(99)]
    data = " ".join(rng.choices([*words, "\n"], k=9000)).encode()
    folder = convert(runner, data, 1500, 1501, 320)
    names = ["pieces.json", "dict.txt", *(f"{s}.{e}" for s in SPLITS for e in ("bin", "idx"))]
    assert sorted(os.listdir(str(folder))) == sorted(names)
    digest = hashlib.sha1()
    for name in names:
        digest.update((folder / name).read_bytes())
    assert digest.hexdigest() == EXPECTED


def test_pieces_stay_within_words_and_the_newline_is_alone(runner):
    folder = convert(runner, b"of the 1984 cats\n of the 1984 cats,\n" * 99, 99, 99, 269)
    symbols = json.loads((folder / "pieces.json").read_text("utf-8"))["model"]["vocab"]
    texts = {pieces.bytes_of(symbol) for symbol in symbols}
    assert len(texts) == 269 and {bytes([byte]) for byte in range(256)} < texts
    longer = {text for text in texts if len(text) > 1}
    assert {b" the", b" 1984", b" cats"} < longer
    assert not [text for text in longer if b"\n" in text or b" " in text[1:]]


def test_only_train_is_learned_from(runner):
    with_test = convert(runner, TEXT + b"zq" * 500, 2, 1000, 300)
    texts = {pieces.bytes_of(s) for s in PieceCodec.load(str(with_test)).dictionary.symbols[4:]}
    assert b"zq" not in texts


def test_bad_input(runner):
    def check(*words, data=b"abc\n" * 9, vocabulary=256, sizes=(3, 3)):
        argv = ("--input", runner.write(data), "--dest", "out", "--vocabulary", vocabulary)
        argv += ("--valid-bytes", sizes[0], "--test-bytes", sizes[1])
        os.chdir(str(runner.folder))
        runner.check_user_error(pieces_script.main, argv, *words)

    check("train gives 258 pieces, not 300", "--vocabulary 258", vocabulary=300)
    check("is empty", data=b"")
    check("train 1, valid 33", sizes=(33, 2))
    done = runner.script("pieces", "--input", "input", "--dest", "out", "--vocabulary", 255)
    assert done.returncode == 2 and "'255' is not a number from 256" in done.stderr


def test_without_the_package(runner):
    runner.write(TEXT)
    code = "import sys; sys.modules['tokenizers'] = None\nfrom fairseq_sha.data import data_bin\n"
    code += "import pieces; data_bin.run(pieces.main)"
    done = runner.code(code, "--input", "input", "--dest", "out")
    runner.check_error(done, "tokenizers is missing; pip install 'fairseq-sha[pieces]'")


def test_torch_and_fairseq_are_not_imported(runner):
    runner.write(TEXT)
    code = "import sys, pieces; pieces.main(sys.argv[1:])\n"
    code += "assert not {'torch', 'fairseq'} & set(sys.modules)"
    options = ("--input", "input", "--dest", "out", "--vocabulary", 300)
    done = runner.code(code, *options)
    assert done.returncode == 0, done.stderr


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\xc3\xa9", b"\xff", b" " * 9]), max_size=60),
    st.lists(st.integers(0, 100), max_size=5),
)
def test_lines_do_not_depend_on_chunks(monkeypatch, parts, cuts):
    monkeypatch.setattr(pieces, "LONGEST_LINE", 5)
    data = b"".join(parts)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[i:j] for i, j in zip(edges, edges[1:])]
    lines = list(pieces.lines(chunks))
    assert lines == list(pieces.lines([data])) and b"".join(lines) == data
    assert all(b"\n" not in line[:-1] and len(line) <= 6 for line in lines)
