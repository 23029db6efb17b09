"""preprocess/lm1b.py, on a small archive in the benchmark's place."""

import gzip
import io
import os
import tarfile

import lm1b
import pytest
from fairseq.data import Dictionary, MMapIndexedDataset

ROOT = "1-billion-word-language-modeling-benchmark-r13output/"
TRAIN = ROOT + "training-monolingual.tokenized.shuffled/news.en-0000{}-of-00004"
HELDOUT = ROOT + "heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050"
FILES = {
    TRAIN.format(2): "b b b\u0085c",  # no last newline
    TRAIN.format(1): "c a a a\nrare\n",
    TRAIN.format(3): "c c once\n",
    HELDOUT.format(0): "a test\n",
    HELDOUT.format(1): "a valid\n",
    HELDOUT.format(2): "a third\n",
    ROOT + "heldout-monolingual.tokenized.shuffled/news.en-00000-of-00004": "all held out\n",
}


def packed(files, mode="w:gz"):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as tar:
        for name, text in files.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


def main(*options):
    lm1b.main(["--dest", "out", *options], shards=3)


def words(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dataset = MMapIndexedDataset(str(folder / split))
    return [" ".join(dictionary[token] for token in dataset[i]) for i in range(len(dataset))]


def check(folder):
    assert words(folder, "train") == [
        *("c a a a </s>", "<unk> </s>", "b b b c </s>", "c c <unk> </s>")
    ]
    assert words(folder, "valid") == words(folder, "test") == ["a <unk> </s>"]


def test_archive(runner, capsys):
    main("--input", runner.write(packed(FILES)))
    check(runner.folder / "out")
    assert (runner.folder / "out" / "dict.txt").read_text() == "c 4\na 3\nb 3\n"
    out = capsys.readouterr().out
    assert "valid is news.en.heldout-00001-of-00050, not the shard of test" in out
    assert "stands for the <S>" in out
    assert sorted(os.listdir(str(runner.folder))) == ["input", "out"]


def test_folder(runner):
    for name, text in FILES.items():
        (runner.folder / name).parent.mkdir(parents=True, exist_ok=True)
        runner.write(text.encode(), name)
    main("--input", ROOT)
    check(runner.folder / "out")
    runner.write(packed(FILES))
    (runner.folder / "again").mkdir()  # filled, as a mount point would be
    lm1b.main(["--dest", "again", "--input", "input"], shards=3)
    for name in sorted(os.listdir(str(runner.folder / "out"))):
        data = (runner.folder / "out" / name).read_bytes()
        assert (runner.folder / "again" / name).read_bytes() == data


def test_open_vocabulary_needs_unknown_words(runner):
    argv = ["--dest", "out", "--input", runner.write(packed(FILES)), "--min-count", "1"]
    message = "line 1 of valid has the word 'valid'"
    runner.check_user_error(lambda argv: lm1b.main(argv, shards=3), argv, message)


def test_valid_and_test(runner):
    vocabulary = runner.write(b"<S>\n<UNK>\nvalid\ntest\nthird\n", "vocabulary")
    main("--input", runner.write(packed(FILES)), "--vocabulary", vocabulary)
    assert words(runner.folder / "out", "valid") == ["<unk> valid </s>"]
    assert words(runner.folder / "out", "test") == ["<unk> test </s>"]


def test_vocabulary(runner):
    """Words in the order of the file; a count in a second field is not a part of the word."""
    vocabulary = runner.write(b"<S> 4\n</S> 4\n<UNK> 0\nb 9\nnone 1\nc 7\n\nrare\n", "vocabulary")
    main("--input", runner.write(packed(FILES)), "--vocabulary", vocabulary)
    assert (runner.folder / "out" / "dict.txt").read_text() == "b 3\nnone 0\nc 4\nrare 1\n"
    assert words(runner.folder / "out", "train")[:2] == ["c <unk> <unk> <unk> </s>", "rare </s>"]


def test_expected_shards():
    names = lm1b.wanted_names(lm1b.SHARDS)
    assert names["train"][0] == "news.en-00001-of-00100"
    assert names["train"][-1] == "news.en-00099-of-00100"
    assert len(names["train"]) == 99
    assert names["test"] == ["news.en.heldout-00000-of-00050"]


def without(name):
    return packed({other: text for other, text in FILES.items() if other != name})


LONG = {**FILES, TRAIN.format(3): "".join(chr(200 + i * i % 991) for i in range(60_000))}
MISTAKES = {
    "a missing shard": (without(TRAIN.format(2)), "has no news.en-00002-of-00004"),
    "no valid": (without(HELDOUT.format(1)), "has no news.en.heldout-00001-of-00050"),
    "no archive": (b"hello " * 1000, "damaged"),
    "empty file": (b"", "damaged"),
    "cut archive": (packed(LONG)[:-30_000], "damaged"),
    "cut tar": (gzip.compress(packed(FILES, "w")[:3600]), "input"),
    "empty shard of test": (packed({**FILES, HELDOUT.format(0): ""}), "test is empty"),
    "carriage return": (packed({**FILES, TRAIN.format(2): "a\n\rb\n"}), "line 4 of train has a"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_mistakes(runner, case):
    data, message = MISTAKES[case]
    argv = ["--dest", "out", "--input", runner.write(data)]
    runner.check_user_error(lambda argv: lm1b.main(argv, shards=3), argv, message)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "vocabulary is empty"),
        (b"<S>\na\n", "vocabulary has no <UNK>"),
        (b"<UNK>\n\xff\n", "vocabulary is not UTF-8 at byte 6"),
    ],
)
def test_wrong_vocabulary(runner, data, message):
    """Found before the archive is read."""
    argv = ["--dest", "out", "--input", "x", "--vocabulary", runner.write(data, "vocabulary")]
    runner.check_user_error(lm1b.main, argv, message, files=["vocabulary"])


def test_vocabulary_has_its_own_order(runner, capsys):
    for option in (("--min-count", "2"), ("--order", "fairseq")):
        with pytest.raises(SystemExit):
            main("--vocabulary", "x", *option)
        assert "no --min-count or --order" in capsys.readouterr().err


def test_missing_input(runner):
    done = runner.script("lm1b", "--dest", "out", "--input", "nowhere")
    runner.check_error(done, "cannot read nowhere", files=[])
