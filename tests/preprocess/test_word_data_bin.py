"""Words to data-bin: the files are those of fairseq-preprocess, or an error is one line."""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary, MMapIndexedDataset

from fairseq_sha.data import data_bin, word_data_bin
from fairseq_sha.errors import UserError

SPLITS = ("train", "valid", "test")
#: All white space of Python, of which only the newline ends a line, and characters like it.
SPACES = [" ", "  ", "\t", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\xa0", "\u2028", "\u2029"]
SPACES += ["\u3000", "\u200a", "\n", "\n", "\n", "\n\n", " \n ", "\r\n"]
WORDS = [
    "a",
    "b",
    "\u200b",
    "\ufeff",
    "é",
    "e\u0301",
    "漢",
    "𝔘",
    "<unk>",
    "<UNK>",
    "madeupword0001",
]
WORDS += ["#fairseq:overwrite", "=", "@-@", "x\x00y", "<s", "1,000"]


def random_text(seed, length, extra=0):
    rng = random.Random(seed)
    words = WORDS + [f"w{i}" for i in range(extra)]
    return "".join(rng.choice(words) + rng.choice(SPACES) for _ in range(length))


def write(folder, texts):
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


@pytest.fixture(scope="module")
def fairseq_preprocess():
    """fairseq-preprocess as a function, since importing it takes seconds."""
    from fairseq import options
    from fairseq_cli import preprocess

    def run(paths, dest, *args):
        argv = ["--only-source", "--destdir", str(dest), *args]
        for name, path in paths.items():
            argv += [f"--{name}pref", str(path)]
        preprocess.main(options.get_preprocessing_parser().parse_args(argv))

    return run


def files_of(folder):
    names = sorted(set(os.listdir(str(folder))) - {"preprocess.log"})
    return {name: (Path(str(folder)) / name).read_bytes() for name in names}


def convert(tmp_path, texts, **options):
    word_data_bin.convert(write(tmp_path, texts), tmp_path / "out", **options)
    return tmp_path / "out"


def tokens_of(folder, split):
    dataset = MMapIndexedDataset(str(folder / split))
    return [dataset[i].tolist() for i in range(len(dataset))]


def words_of(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    return [[dictionary[token] for token in item] for item in tokens_of(folder, split)]


# The same files as fairseq's.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "ours, its",
    [
        ({}, ()),
        ({"min_count": 4}, ("--thresholdsrc", "4")),
        ({"max_size": 15}, ("--nwordssrc", "15")),
        ({"max_size": 40, "min_count": 3}, ("--nwordssrc", "40", "--thresholdsrc", "3")),
    ],
)
def test_files_equal_fairseqs(tmp_path, monkeypatch, fairseq_preprocess, seed, ours, its):
    monkeypatch.setattr(word_data_bin, "BLOCK", 7)  # cut everywhere
    monkeypatch.setattr(data_bin, "TOKENS", 11)
    texts = {s: random_text(i + 10 * seed, 300, 50 * seed) for i, s in enumerate(SPLITS)}
    texts["valid"] += "unseen"  # and no last newline
    texts["test"] += "\n\n\n"
    folder = convert(tmp_path, texts, order="fairseq", unknown="always", **ours)
    fairseq_preprocess(write(tmp_path, texts), tmp_path / "its", *its)
    assert files_of(folder) == files_of(tmp_path / "its")


@pytest.mark.parametrize("types", [65_490, 65_500])
def test_width_of_tokens_is_fairseqs(tmp_path, fairseq_preprocess, types):
    texts = {"train": " ".join(f"w{i}" for i in range(types)), "valid": "w0 w1 w2"}
    folder = convert(tmp_path, texts, order="fairseq")
    fairseq_preprocess(write(tmp_path, texts), tmp_path / "its")
    assert files_of(folder) == files_of(tmp_path / "its")
    assert (folder / "valid.bin").stat().st_size == 4 * (2 if types == 65_490 else 4)


@pytest.mark.parametrize("order", word_data_bin.ORDERS)
def test_stock_language_modeling_task_opens_it(tmp_path, order):
    from fairseq import options, tasks

    folder = convert(tmp_path, dict.fromkeys(SPLITS, "b a <unk>\n\nb c\n"), order=order)
    parser = options.get_training_parser()
    argv = [str(folder), "--task", "language_modeling", "--tokens-per-sample", "3"]
    args = options.parse_args_and_arch(parser, [*argv, "--arch", "transformer_lm"])
    task = tasks.setup_task(args)
    for split in SPLITS:
        task.load_dataset(split)
        tokens = np.concatenate([task.dataset(split)[i]["target"] for i in range(3)])
        words = [task.dictionary[i] for i in tokens[:7]]
        assert words == ["b", "a", "<unk>", "</s>", "</s>", "b", "c"]


# What is in the files.


def test_order_of_the_published_code(tmp_path):
    """Counter.most_common: ties stay in order of first appearance; no padding."""
    text = random_text(3, 500, 60).replace("<unk>", "z")
    folder = convert(tmp_path, {"train": text, "valid": text})
    counts = Counter(word for line in text.split("\n") for word in line.split())
    expected = "".join(f"{word} {count}\n" for word, count in counts.most_common())
    assert (folder / "dict.txt").read_bytes() == expected.encode()


def test_lines(tmp_path):
    folder = convert(tmp_path, {"train": "\n\n a  b\r\n<unk>\n\n", "valid": "b\u2028a\x85b\n \nb"})
    assert words_of(folder, "train") == [
        *(["</s>"], ["</s>"], ["a", "b", "</s>"], ["<unk>", "</s>"], ["</s>"])
    ]
    assert words_of(folder, "valid") == [["b", "a", "b", "</s>"], ["</s>"], ["b", "</s>"]]


def test_summary(tmp_path, capsys):
    paths = write(tmp_path, {"train": "a b <unk> a\n\n", "valid": "a zz\n"})
    summary = word_data_bin.convert(paths, tmp_path / "out")
    assert summary.splits == {"train": (2, 4, 1), "valid": (1, 2, 1)}
    assert summary.splits["train"].tokens == 6
    assert (summary.types, summary.symbols) == (3, 6)
    assert "valid: 1 lines, 2 words (1 of them <unk>), 3 tokens" in capsys.readouterr().out


def test_streams_and_iterables(tmp_path):
    text = "a bc\nd <unk> é\n".encode()
    paths = write(tmp_path, {"train": text, "valid": text})
    word_data_bin.convert(paths, tmp_path / "out")
    with open(str(paths["train"]), "rb") as stream:
        pieces = (bytes([byte]) for byte in text)
        word_data_bin.convert({"train": stream, "valid": pieces}, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_given_vocabulary(tmp_path):
    texts = {"train": "a b b c\n", "valid": "d a\n"}
    folder = convert(tmp_path, texts, vocabulary=["c", "zz", "a"], unknown="always")
    assert (folder / "dict.txt").read_text() == "c 1\nzz 0\na 1\n"
    assert tokens_of(folder, "train") == [[6, 3, 3, 4, 2]]
    assert tokens_of(folder, "valid") == [[3, 6, 2]]


def test_special_symbol_in_a_given_vocabulary(tmp_path):
    with pytest.raises(UserError, match="the vocabulary has <pad>"):
        convert(tmp_path, {"train": GOOD}, vocabulary=["a", "<pad>"])


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Peak memory of a conversion of 40 MB, above that of one of 4 MB."""
    import subprocess

    code = (
        "import sys, resource\n"
        "from fairseq_sha.data import word_data_bin\n"
        "block = b' '.join(b'w%d' % (i % 5000) for i in range(70_000)) + b'\\n'\n"
        "def blocks(): yield from (block for _ in range(int(sys.argv[1])))\n"
        "word_data_bin.convert({'train': blocks()}, sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for times in (10, 100):
        command = [sys.executable, "-c", code, str(times), f"out{times}"]
        done = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 8_000  # KB; the tokens alone take 28,000


# Bad input.

GOOD = "a b\nc <unk>\n"
MISTAKES = {
    "empty train": ({"train": ""}, "train.txt is empty"),
    "empty valid": ({"valid": b""}, "valid.txt is empty"),
    "a blank line": ({"valid": "\n"}, "valid.txt is one blank line"),
    "not UTF-8": ({"train": b"a\nb \xff c\n"}, "line 2 of {}train.txt is not UTF-8 (byte 255)"),
    "cut UTF-8": ({"train": b"a b\n\n\xe2\x80"}, "line 3 of {}train.txt is not UTF-8"),
    "lone carriage return": ({"train": "a\r\n\nb\rc\n"}, "line 3 of {}train.txt has a carriage"),
    "two carriage returns": ({"valid": "a\r\r\n"}, "line 1 of {}valid.txt has a carriage return"),
    "carriage return and space": ({"valid": "a\nb\r \nb"}, "line 2 of {}valid.txt has a carriage"),
    "<s> in train": ({"train": "a\nb <s> b\n"}, "line 2 of {}train.txt has the word <s>"),
    "<pad> in valid": ({"valid": "a\n\n<pad>\n"}, "line 3 of {}valid.txt has the word <pad>"),
    "</s> in train": ({"train": "a </s>\nb\n"}, "line 1 of {}train.txt has the word </s>"),
    "</s> in valid": ({"valid": "a\nb </s> b\n"}, "line 2 of {}valid.txt has the word </s>"),
    "not covered": ({"train": "a b\n", "valid": "a\nb c\n"}, "line 2 of {}valid.txt has the word"),
    "missing <unk>": ({"train": "a b\n", "valid": "a\n\nb c\n"}, "a minimum count of 2"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_mistakes(tmp_path, monkeypatch, case):
    monkeypatch.setattr(word_data_bin, "BLOCK", 3)
    texts, words = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        convert(tmp_path, {"train": GOOD, "valid": GOOD, **texts})
    assert words.format(f"{tmp_path}/") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(str(tmp_path))) == ["train.txt", "valid.txt"]


def test_closed_vocabulary(tmp_path):
    """``<unk>`` in train does not help where every word must be covered."""
    with pytest.raises(UserError, match="line 1 of .*valid.txt has the word 'zz'"):
        convert(tmp_path, {"train": GOOD, "valid": "a zz <unk>\n"}, unknown="never")
    convert(tmp_path, {"train": GOOD, "valid": "a <unk>\n"}, unknown="never")


def test_rare_words_are_what_is_unknown(tmp_path):
    folder = convert(tmp_path, {"train": "a a b\n", "valid": "a c\n"}, min_count=2)
    assert words_of(folder, "valid") == [["a", "<unk>", "</s>"]]


def test_check_comes_before_the_folder(tmp_path):
    def check(summary):
        raise UserError(f"{summary.types} types")

    with pytest.raises(UserError, match="4 types"):
        convert(tmp_path, {"train": GOOD, "valid": GOOD}, check=check)
    assert sorted(os.listdir(str(tmp_path))) == ["train.txt", "valid.txt"]


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        word_data_bin.convert({"train": tmp_path / "nowhere"}, tmp_path / "out")
    assert os.listdir(str(tmp_path)) == []
