"""``fairseq-sha score``: texts of any size, pictures, figures as JSON, and two models."""

import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from fairseq_sha.commands import main
from fairseq_sha.data.codecs import PART
from fairseq_sha.evaluation.evaluate import evaluate, token_losses
from fairseq_sha.evaluation.policies import Carried
from fairseq_sha.reading import difference, kinds, picture, report, texts
from fairseq_sha.trained_model import TrainedModel
from tests.commands import REPOSITORY, command
from tests.options import SHA_RNN
from tests.tiny_corpus import text, write_folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two checkpoints of one run; the second is trained longer."""
    data, folder = write_folder(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("run")
    options = f"{SHA_RNN} --max-update 40 --save-interval-updates 5 --save-dir {folder}"
    done = command("fairseq-train", data, options)
    assert done.returncode == 0, done.stdout
    return str(next(folder.glob("checkpoint_*_5.pt"))), str(folder / "checkpoint_last.pt")


@pytest.fixture(scope="module")
def path(paths):
    return paths[1]


@pytest.fixture(scope="module")
def sha_rnn(path):
    return TrainedModel.load(path, cpu=True)


# Parts


def in_chunks(data, sizes):
    """A text cut at random places."""
    chosen, begin = np.random.RandomState(3), 0
    while begin < len(data):
        size = int(chosen.choice(sizes))
        yield data[begin : begin + size]
        begin += size


class Whole:
    """A text of which all tokens are in memory."""

    def __init__(self, model, data):
        self.tokens = np.append(model.codec.start, model.encode(data).numpy())

    def __len__(self):
        return len(self.tokens) - 1


@pytest.mark.parametrize("sizes", [[1, 7, 39, 40, 41, 200], [5000], [40]])
def test_reading_in_parts_equals_reading_at_once(sha_rnn, sizes):
    data = text(3011, seed=4)
    policy = Carried(1, 40)
    expected_score, expected = evaluate(
        sha_rnn.models[0], Whole(sha_rnn, data), "other", sha_rnn.codec, policy
    )
    reading = sha_rnn.reading(in_chunks(data, sizes))
    found = list(reading)
    assert b"".join(part for part, _, _ in found) == data
    costs = np.concatenate([nats for _, _, nats in found])
    assert costs.dtype == np.float32 and np.array_equal(costs, expected)
    assert reading.score == expected_score
    for part, tokens, nats in found:
        assert len(part) == len(tokens) == len(nats)
        assert np.array_equal(tokens, sha_rnn.encode(part).numpy())


def test_another_rule_scores_each_segment_in_order(sha_rnn):
    data, seen = text(205), []

    def losses(model, batch):
        seen.append((batch["net_input"]["segment"], batch["target"].numel()))
        return token_losses(model, batch) + len(seen)

    score, _, nats = sha_rnn.costs(data, losses=losses)
    _, _, plain = sha_rnn.costs(data)
    assert seen == [(f"text:1:{i}", 40) for i in range(5)] + [("text:1:5", 5)]
    np.testing.assert_allclose(nats - plain, np.arange(205) // 40 + 1, atol=1e-5)
    assert score.nats == pytest.approx(float(nats.sum()), rel=1e-5)


def test_one_text_after_the_other_starts_from_nothing(sha_rnn):
    first, second = text(90, seed=8), text(90, seed=9)
    alone = sha_rnn.bits(second)
    unfinished = iter(sha_rnn.reading([first, first]))
    next(unfinished)
    assert np.array_equal(sha_rnn.bits(second), alone)


def test_byte_that_the_model_lacks_is_named_before_anything_is_read(path, tmp_path, capsys):
    (tmp_path / "text").write_bytes(text(PART + 10) + b"Z")
    assert main(["score", "--path", path, "--cpu", "--per-line", str(tmp_path / "text")]) == 1
    out, error = capsys.readouterr()
    assert f"byte 90 at offset {PART + 10} of the text does not occur" in error and not out


# A text of so many bytes, read in a process of its own: how many more kB that takes in the end than
# the start. The model's own work is left out, as its segments have the same size for any text.
MEMORY = """
import os, resource, sys
import numpy as np
from fairseq_sha.commands import main
from fairseq_sha.evaluation import evaluate
def losses(model, batch):
    return __import__("torch").ones(batch["target"].shape)
import fairseq_sha.trained_model as trained_model
trained_model.Reading.__init__.__defaults__ = (losses, None)
arguments = sys.argv[1:]
status = main(arguments)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def peak(*words):
    """The most memory that a command had, in kB, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)[1]), done.stdout


def test_memory_does_not_grow_with_the_text(path, tmp_path):
    unit = text(50_000)
    peaks = []
    for name, copies in (("small", 6), ("large", 100)):
        (tmp_path / name).write_bytes(unit * copies)
        size, out = peak(
            *["score", "--path", path, "--cpu", "--model-overrides", "{'tokens_per_sample': 5000}"],
            *["--html", tmp_path / f"{name}.html", "--json", tmp_path / f"{name}.json"],
            tmp_path / name,
        )
        assert f"{50_000 * copies:,} tokens" in out
        peaks.append(size)
    # 4.7 MB more text; as lists of a number for each byte it would be hundreds of MB.
    assert peaks[1] - peaks[0] < 15_000
    assert len(list((tmp_path / "large_pages").glob("page*.html"))) == 26
# Scores


def test_kinds_of_bytes():
    line = "<b>The 1st</b> [[café]]'s\n== x ==\n*&amp; a*b"
    found = [kinds.KINDS[k] for k in kinds.kinds_of_bytes(line.encode())]
    assert len(found) == len(line.encode())
    short = {"markup": "m", "digits": "d", "white space": "w", "other signs": "s"}
    short.update({"first letters of words": "F", "other letters": "o"})
    #                                      <b>The 1st</b> [[caféé]]'s
    assert "".join(short[k] for k in found) == "mmmFoowdFommmmwmmFoooommsFw" + (
        "mmwFwmmw" + "mmmmmmwFsF"
    )


def test_score_prints_what_the_text_costs(sha_rnn, path, tmp_path, capsys):
    data = text(600, seed=7)
    (tmp_path / "text").write_bytes(data)
    bits = sha_rnn.bits(data)
    assert main(["score", "--path", path, "--cpu", "--per-line", str(tmp_path / "text")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(str(tmp_path)))
    assert f"{bits.mean():.4f} bits per byte" in lines[start]
    words = len(data.split()) + data.count(b"\n")
    assert f"600 tokens, 600 bytes, {words} words; state carried, 1 streams" in lines[start]
    rows = [line.split("\t") for line in lines[:start]]
    assert [row[2].encode() for row in rows] == data.rstrip(b"\n").split(b"\n")
    assert sum(float(row[1]) for row in rows) == pytest.approx(bits.sum(), abs=0.05 * len(rows))
    assert float(rows[0][0]) == pytest.approx(bits[: len(rows[0][2]) + 1].mean(), abs=6e-4)
    cells = [line.split("|") for line in lines[start + 3 :]]
    assert sum(int(row[2]) for row in cells) == 600
    total = sum(int(row[2]) * float(row[3]) for row in cells)
    assert total == pytest.approx(bits.sum(), abs=0.0005 * 600)


class Text(HTMLParser):
    """The text of a page within pre, and the colour of each character."""

    def __init__(self, page):
        super().__init__()
        self.inside, self.colour, self.characters, self.open = False, None, [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = self.inside or tag == "pre"
        if self.inside and tag == "span":
            self.colour = dict(attributes)["class"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.characters += [(character, self.colour) for character in data]


def test_picture_colours_each_character_by_its_cost():
    data = "a<é\n&".encode() + b"\xff"
    bits = np.array([0.1, 0.9, 2, 4, 99, 1.5, 7.2])
    page = picture.picture("<name>", "total", data, bits)
    assert "<title>&lt;name&gt;</title>" in page and "http" not in page
    colours = {"a": 0, "<": 1, "é": 6, "\u21b5": 15, "\n": 15, "&": 3, "\\": 14, "x": 14, "f": 14}
    expected = [(c, f"c{colours[c]}") for c in "a<é\u21b5\n&\\xff"]
    assert Text(page).characters == expected


def test_score_draws_standard_input(path, tmp_path, monkeypatch, capsys):
    def scored(data):
        (tmp_path / "picture.html").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        picture = str(tmp_path / "picture.html")
        assert main(["score", "--path", path, "--cpu", "--html", picture, "-"]) == 0
        page = Text((tmp_path / "picture.html").read_text(encoding="utf-8"))
        shown = "".join(character for character, _ in page.characters)
        return capsys.readouterr().out, shown

    out, shown = scored(b"abc\ndef")
    assert out.startswith("standard input: ") and "7 bytes" in out
    assert shown == "abc\u21b5\ndef"
    out, shown = scored(b"")
    assert out == "standard input: 0 bytes\n" and shown == ""


