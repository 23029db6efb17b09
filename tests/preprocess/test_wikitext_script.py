"""preprocess/wikitext.py, on small archives in WikiText's place."""

import io
import os
import zipfile

import pytest
import wikitext
from fairseq.data import Dictionary, MMapIndexedDataset

from fairseq_sha.data import downloads

from .helpers import read_back, split_lines

SPLITS = ("train", "valid", "test")
TOKENS = {
    "train": " \n = A = \n \n b b @-@ c <unk> \n d é\u2028e \n",
    "valid": " \n = b = \n \n c <unk> \n",
    "test": " \n c = \n",
}
RAW = {
    "train": " \n = A = \n \n b b @-@ c f \n d é\u2028e \n",
    "valid": " \n = b = \n \n c f \n",
    "test": " \n c = \n\n",
}
# In train are =, A, b, @-@, c, <unk>, d, é, e; and </s>.
EXPECTED = {"2": wikitext.Expected({"valid": 4, "test": 2}, {"valid": 5, "test": 2}, 10)}


def zipped(texts, variant="tokens", folder="wikitext-2/"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        if folder:
            archive.writestr(folder, b"")
        for split, text in texts.items():
            data = text if isinstance(text, bytes) else text.encode()
            archive.writestr(f"{folder}wiki.{split}.{variant}", data)
    return file.getvalue()


def main(*options):
    wikitext.main(["--corpus", "2", "--dest", "out", *options], corpora=EXPECTED)


def words(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dataset = MMapIndexedDataset(str(folder / split))
    return [[dictionary[token] for token in dataset[i].tolist()] for i in range(len(dataset))]


def check_words(folder):
    for split, text in TOKENS.items():
        lines = [[*line.split(), "</s>"] for line in text.split("\n")[:-1]]
        assert words(folder, split) == lines


def test_published_counts():
    for corpus, vocabulary in (("103", 267_735), ("2", 33_278)):
        expected = wikitext.CORPORA[corpus]
        assert expected.vocabulary == vocabulary
        assert expected.lines == {"valid": 3_760, "test": 4_358}
        with_ends = {s: expected.words[s] + expected.lines[s] for s in expected.words}
        assert with_ends == {"valid": 217_646, "test": 245_569}


@pytest.mark.parametrize("folder", ["wikitext-2/", ""])
def test_zip(runner, folder):
    main("--input", runner.write(zipped(TOKENS, folder=folder)))
    check_words(runner.folder / "out")
    symbols = (runner.folder / "out" / "dict.txt").read_text(encoding="utf-8").split("\n")
    assert symbols[:5] == ["= 2", "b 2", "A 1", "@-@ 1", "c 1"]


def test_folder(runner):
    (runner.folder / "input").mkdir()
    for split, text in TOKENS.items():
        runner.write(text.encode(), f"input/wiki.{split}.tokens")
    main("--input", "input", "--order", "fairseq")
    check_words(runner.folder / "out")
    dictionary = Dictionary.load(str(runner.folder / "out" / "dict.txt"))
    assert len(dictionary) == 16 and dictionary.symbols[6] == "@-@"


def test_raw_is_bytes(runner):
    main("--variant", "raw", "--input", runner.write(zipped(RAW, "raw")))
    expected = [split_lines(RAW[split].encode()) for split in SPLITS]
    assert read_back(runner.folder / "out") == expected


def test_raw_text_may_quote_the_unknown_word(runner):
    texts = {**RAW, "train": RAW["train"] + "x " * 1000 + "<unk> \n"}
    main("--variant", "raw", "--input", runner.write(zipped(texts, "raw")))


def damaged(data):
    middle = data.index(b"PK\x01\x02") - 40  # in the last member
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


LONG = {**TOKENS, "test": " \n" + " ".join(chr(200 + i % 97 * i % 89) for i in range(900)) + "\n"}
MISTAKES = {
    "other numbers": (
        zipped({**TOKENS, "valid": "b \n c \n", "train": TOKENS["train"] + "zz \n"}),
        "2 lines in valid, not 4; 2 words in valid, not 5; 11 words in the vocabulary",
    ),
    "a word that train lacks": (zipped({**TOKENS, "test": " \n x = \n"}), "the word 'x'"),
    "raw text named tokens": (zipped({**RAW, "valid": TOKENS["test"]}), "use --variant raw"),
    "the raw zip": (zipped(RAW, "raw"), "holds the variant raw, not tokens; use --variant raw"),
    "a missing file": (zipped({"train": "a \n", "test": "a \n"}), "has no wiki.valid.tokens"),
    "no zip": (b"hello", "damaged"),
    "empty file": (b"", "damaged"),
    "cut zip": (zipped(TOKENS)[:-30], "damaged"),
    "damaged zip": (damaged(zipped(LONG)), "damaged"),
    "empty split": (zipped({**TOKENS, "test": ""}), "wiki.test.tokens is empty"),
    "not UTF-8": (zipped({**TOKENS, "test": b" \n c \n \xff"}), "line 3 of input/wiki"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_mistakes(runner, case):
    data, message = MISTAKES[case]
    argv = ["--corpus", "2", "--dest", "out", "--input", runner.write(data)]
    runner.check_user_error(lambda argv: wikitext.main(argv, EXPECTED), argv, "input", message)


RAW_MISTAKES = {
    "the tokens zip": (zipped(TOKENS), "holds the variant tokens, not raw; use --variant tokens"),
    "tokens named raw": (zipped(TOKENS, "raw"), "is not raw: 1 of its first 10 words are <unk>"),
    "empty split": (zipped({**RAW, "test": ""}, "raw"), "wiki.test.raw has 0 bytes"),
    "damaged zip": (damaged(zipped({**RAW, "test": LONG["test"]}, "raw")), "damaged"),
}


@pytest.mark.parametrize("case", sorted(RAW_MISTAKES))
def test_mistakes_in_raw(runner, case):
    data, message = RAW_MISTAKES[case]
    argv = ["--corpus", "2", "--variant", "raw", "--dest", "out", "--input", runner.write(data)]
    runner.check_user_error(wikitext.main, argv, "input", message)


def test_neither_file_nor_folder(runner):
    done = runner.script("wikitext", "--corpus", "2", "--dest", "out", "--input", "nowhere")
    runner.check_error(done, "cannot read nowhere", files=[])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--all-bytes"], "--all-bytes is for --variant raw"),
        (["--variant", "raw", "--order", "fairseq"], "--order is for --variant tokens"),
        (["--input", "x", "--url", "http://x"], "--url: not allowed with argument --input"),
        (["--input", ""], "--input: is empty; name a file"),
    ],
)
def test_wrong_options(runner, capsys, options, message):
    with pytest.raises(SystemExit):
        main(*options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "corpus, variant, name",
    [
        ("103", "tokens", "wikitext-103-v1.zip"),
        ("2", "raw", "wikitext-2-raw-v1.zip"),
    ],
)
def test_download(runner, monkeypatch, corpus, variant, name):
    """From the new place, under a name that it does not refuse; next time from the file."""
    monkeypatch.delenv("http_proxy", raising=False)
    requests = []

    class Response(io.BytesIO):
        headers = {}

        def getcode(self):
            return 200

    def urlopen(request, timeout):
        requests.append((request.full_url, request.get_header("User-agent")))
        return Response(zipped(RAW if variant == "raw" else TOKENS, variant))

    monkeypatch.setattr(downloads.urllib.request, "urlopen", urlopen)
    for dest in ("data/out", "data/again"):
        wikitext.main(
            ["--corpus", corpus, "--variant", variant, "--dest", dest],
            corpora={corpus: EXPECTED["2"]},
        )
    assert requests == [(f"https://wikitext.smerity.com/{name}", downloads.USER_AGENT)]
    assert not downloads.USER_AGENT.startswith("Python")
    assert sorted(os.listdir(str(runner.folder / "data"))) == ["again", "out", name]
