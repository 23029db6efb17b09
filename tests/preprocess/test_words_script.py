"""preprocess/words.py: any text to words with sacremoses, and back."""

import os
import signal
import subprocess
import sys
import time

import pytest
import words as words_script
from fairseq.data import Dictionary, MMapIndexedDataset

from .helpers import PREPROCESS, REPOSITORY

pytest.importorskip("sacremoses", reason="the extra 'words' is not installed")

LINE = 'He said: "It\u2019s a well-known, 1,234,567.5 dollar deal (3.5%)."'
LINE_OF_WORDS = (
    'He said : " It \'s a well @-@ known , 1 @,@ 234 @,@ 567 @.@ 5 dollar deal ( 3 @.@ 5 % ) . "'
)
BACK = 'He said: "It\'s a well-known, 1,234,567.5 dollar deal (3.5%)."'


def main(*options):
    words_script.main(["--input", "input", "--dest", "out", "--workers", "1", *options])


def words(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dataset = MMapIndexedDataset(str(folder / split))
    return [" ".join(dictionary[token] for token in dataset[i]) for i in range(len(dataset))]


def splits(runner):
    return [words(runner.folder / "out", split) for split in ("train", "valid", "test")]


def test_words_are_like_wikitexts(runner):
    runner.write(f"{LINE}\n\n".encode() * 30)
    main("--min-count", "1")
    train, valid, test = splits(runner)
    assert train + valid + test == [f"{LINE_OF_WORDS} </s>", "</s>"] * 30


def test_round_trip(runner):
    runner.write(f"{LINE_OF_WORDS}\n\nx @-@ y @-@ z\nno newline".encode())
    done = runner.script("words", "--detokenize", "input", "--output", "text")
    assert done.returncode == 0, done.stderr
    text = (runner.folder / "text").read_text(encoding="utf-8")
    assert text == f"{BACK}\n\nx-y-z\nno newline"


def test_detokenize_standard_input(runner):
    done = runner.script("words", "--detokenize", "-", "--output", "text", input="a b .\n")
    assert done.returncode == 0, done.stderr
    assert (runner.folder / "text").read_bytes() == b"a b.\n"


def test_language(runner):
    runner.write(b"Das ist z.B. gut. Usw. etc.\n" * 40)
    main("--lang", "de", "--min-count", "1")
    assert splits(runner)[0][0].startswith("Das ist z.B. gut")


def test_splits_are_cut_at_ends_of_lines(runner):
    runner.write(b"aaa aaa\n" * 4 + b"bbb bbb\n" * 2 + b"ccc ccc\n")
    # 11 bytes from the end is within the last b line, and 20 within the one before it.
    main("--test-bytes", "11", "--valid-bytes", "9", "--max-size", "5")
    train, valid, test = splits(runner)
    assert train == ["aaa aaa </s>"] * 4 + ["<unk> <unk> </s>"]
    assert valid == test == ["<unk> <unk> </s>"]


def test_cut_where_a_line_begins(runner):
    runner.write(b"a a\n" * 5)
    main("--test-bytes", "4", "--valid-bytes", "8")
    assert [len(split) for split in splits(runner)] == [2, 2, 1]


def test_vocabulary(runner):
    runner.write(b"a a a b b b c c\n" * 1 + b"a d\n" + b"b c\n")
    main("--valid-bytes", "4", "--test-bytes", "4")
    assert splits(runner) == [
        ["a a a b b b <unk> <unk> </s>"],
        ["a <unk> </s>"],
        ["b <unk> </s>"],
    ]


def test_workers_keep_the_order(runner):
    lines = [f"line {i} of - many , {i % 7}.{i % 3}\n" for i in range(6000)]
    text = runner.write("".join(lines).encode())
    folders = []
    for workers in ("1", "3"):
        done = runner.script(
            *("words", "--input", text, "--dest", f"out{workers}", "--workers", workers)
        )
        assert done.returncode == 0, done.stderr
        folder = runner.folder / f"out{workers}"
        folders.append({name: (folder / name).read_bytes() for name in os.listdir(str(folder))})
    assert folders[0] == folders[1]
    assert len(folders[0]) == 7


def test_long_lines_and_no_last_newline(runner, monkeypatch):
    monkeypatch.setattr(words_script, "CHUNK", 10)
    runner.write(b"a longer line than a chunk\n" * 4 + b"a\n\n\nline line line")
    main("--valid-bytes", "20", "--test-bytes", "14", "--min-count", "1")
    line = "a longer line than a chunk </s>"
    assert splits(runner) == [[line] * 4, ["a </s>", "</s>", "</s>"], ["line line line </s>"]]


def test_special_symbols_in_the_text_are_words(runner):
    runner.write(b"<s> </s> <pad> <unk>\n" * 30)
    main()
    assert splits(runner)[2][0] == "< s > < / s > < pad > < unk > </s>"


# Bad input.

MISTAKES = {
    "not UTF-8": (b"a a\n" * 50 + b"b \xff\n" + b"a a\n" * 9, "line 51 of input is not UTF-8"),
    "carriage return": (b"a a\n" * 55 + b"a\ra\n" + b"a a\n", "line 56 of input has a carriage"),
    "empty": (b"", "input has 0 bytes"),
    "one line": (b"a a a", "none of its lines are left for valid"),
    "rest is blank": (b"a a\n" * 50 + b"\n" * 20, "is one blank line"),
}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_mistakes(runner, case, workers):
    data, message = MISTAKES[case]
    argv = ["--input", runner.write(data), "--dest", "out", "--workers", workers]
    if case == "rest is blank":
        argv += ["--test-bytes", "1", "--valid-bytes", "9"]
    runner.check_user_error(words_script.main, argv, message)


def test_unknown_words_without_rare_ones(runner):
    runner.write(b"a a\n" * 30 + b"b\n")
    argv = ["--input", "input", "--dest", "out", "--min-count", "1"]
    runner.check_user_error(words_script.main, argv, "has the word 'b'", "minimum count of 2")


def test_unknown_language(runner):
    argv = ["--input", runner.write(b"a\n" * 50), "--dest", "out", "--lang", "xx"]
    runner.check_user_error(words_script.main, argv, "language 'xx'", "de, el, en")


def test_missing_sacremoses(runner):
    code = "import sys; sys.modules['sacremoses'] = None\nimport words\n"
    code += "from fairseq_sha.data import data_bin\ndata_bin.run(words.main)\n"
    done = runner.code(code, "--input", runner.write(b"a\n" * 50), "--dest", "out")
    runner.check_error(done, "sacremoses is missing; pip install 'fairseq-sha[words]'")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "one of the arguments --input --detokenize"),
        (("--input", "x"), "--input and --dest belong together"),
        (("--detokenize", "x"), "--detokenize and --output belong together"),
        (("--input", "x", "--dest", "y", "--output", "z"), "--detokenize and --output belong"),
        (("--detokenize", "x", "--output", "y", "--dest", "z"), "--input and --dest belong"),
        (("--input", "x", "--dest", "y", "--min-count", "0"), "not a positive whole number"),
        (("--input", "x", "--dest", "y", "--valid-bytes", "9"), "need each other"),
    ],
)
def test_wrong_options(runner, capsys, options, message):
    with pytest.raises(SystemExit):
        words_script.main(list(options))
    assert message in capsys.readouterr().err


def test_detokenize_mistakes(runner):
    argv = ["--detokenize", runner.write(b"a\n\xff\n"), "--output", "text"]
    runner.check_user_error(words_script.main, argv, "line 2 of input is not UTF-8")
    argv = ["--detokenize", "input", "--output", "no/text"]
    runner.check_user_error(words_script.main, argv, "cannot write no/text")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(runner, number):
    runner.write(b"some words to tokenize, and more.\n" * 500_000)
    process = subprocess.Popen(
        [sys.executable, str(PREPROCESS / "words.py"), "--input", "input", "--dest", "out"]
        + ["--workers", "2"],
        cwd=str(runner.folder),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not list(runner.folder.glob(".out.*/train.bin")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal and a batch system do
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.decode() == f"error: stopped by {number.name}\n"
    assert os.listdir(str(runner.folder)) == ["input"]


def test_killed_worker(runner):
    code = "import os, signal, words\nfrom fairseq_sha.data import data_bin\n"
    code += "words.tokenize = lambda lang, text: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "data_bin.run(words.main)\n"
    done = runner.code(
        code, "--input", runner.write(b"a b\n" * 90), "--dest", "out", "--workers", "2"
    )
    runner.check_error(done, "a process that tokenizes was killed", "use fewer --workers")


@pytest.mark.parametrize("name", ["words", "wikitext", "lm1b"])
def test_help_is_the_docstring(runner, name):
    done = runner.script(name, "--help")
    assert done.returncode == 0
    assert f"    python preprocess/{name}.py --" in done.stdout


def test_importing_needs_neither_fairseq_nor_torch():
    code = (
        "import sys, words, wikitext, lm1b\n"
        "print(sorted({'fairseq', 'torch', 'sacremoses', 'tqdm', 'yaml'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=str(PREPROCESS), env=env, stdout=subprocess.PIPE)
    assert done.stdout == b"[]\n"
