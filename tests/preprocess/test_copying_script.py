"""preprocess/copying.py: selective copying as a data-bin folder."""

import filecmp

import pytest

from .helpers import read_back

SMALL = ["--length", 20, "--letters", 5, "--alphabet", 3, "--train", 2100, "--valid", 7]


def make(runner, dest, *options):
    done = runner.script("copying", "--dest", dest, *SMALL, "--test", 9, *options)
    assert done.returncode == 0, done.stderr
    return runner.folder / dest


def test_lines_are_questions_and_their_answers(runner):
    splits = read_back(make(runner, "out"))
    assert [len(lines) for lines in splits] == [2101, 8, 10]
    places, seen = set(), set()
    for first, *lines in splits:
        assert first == b"\n"
        for line in lines:
            question, answer = line[:-1].split(b"/")
            assert len(question) == 20 and len(answer) == 5 and line[-1:] == b"\n"
            assert question.replace(b".", b"") == answer
            places |= {i for i in range(20) if question[i] != ord(".")}
            seen |= set(answer)
    assert places == set(range(20)) and seen == set(b"abc")
    everything = [line for lines in splits for line in lines[1:]]
    assert len(set(everything)) > 0.99 * len(everything)  # no split repeats another


def test_seed_decides(runner):
    first, same = make(runner, "first"), make(runner, "same")
    other = make(runner, "other", "--seed", 2)
    names = [f"{split}.bin" for split in ("train", "valid", "test")] + ["dict.txt"]
    assert filecmp.cmpfiles(first, same, names, shallow=False)[0] == names
    assert not filecmp.cmpfiles(first, other, names[:3], shallow=False)[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", 4], "a line has 4 places"),
        (["--alphabet", 27], "there are 26 letters"),
        (["--seed", 2**32], "must be less than 2^32"),
        (["--train", 0], "not a positive whole number"),
    ],
)
def test_refusals(runner, options, message):
    done = runner.script("copying", "--dest", "out", *SMALL, *options)
    assert done.returncode == 2 and message in done.stderr
    assert not (runner.folder / "out").exists()
