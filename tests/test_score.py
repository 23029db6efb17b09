"""``fairseq-sha score``: texts of any size, pictures, figures as JSON, and two models."""

import colorsys
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

from fairseq_sha import UserError, trained_model
from fairseq_sha.commands import main
from fairseq_sha.data.codecs import PART
from fairseq_sha.evaluation.dynamic import SGD, Dynamic, Statistics
from fairseq_sha.evaluation.evaluate import evaluate, token_losses
from fairseq_sha.evaluation.policies import Carried, Tokens
from fairseq_sha.reading import difference, json_report, kinds, picture, texts
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.commands import REPOSITORY
from tests.tiny_corpus import text


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two models."""
    folder = tmp_path_factory.mktemp("models")
    return [random_checkpoint.write(folder / f"{seed}.pt", seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def path(paths):
    return paths[0]


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


@pytest.mark.parametrize("sizes", [[1, 7, 39, 40, 41, 200], [5000], [40]])
def test_reading_in_parts_equals_reading_at_once(sha_rnn, sizes):
    data = text(3011, seed=4)
    policy = Carried(1, 40)
    whole = Tokens(np.append(sha_rnn.codec.start, sha_rnn.encode(data).numpy()))
    expected_score, expected = evaluate(sha_rnn.models[0], whole, "other", sha_rnn.codec, policy)
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


# Weights that learn


DYNAMIC = Dynamic(Carried(1, 7), SGD(0.02, 0.01))


@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_weights_go_on_learning_from_part_to_part(path, tmp_path, monkeypatch, capsys, rule):
    """A text costs the same to the last bit, however many parts it is read in."""
    data = text(601, seed=5)
    (tmp_path / "text").write_bytes(data)
    words = ["score", "--path", path, "--cpu", str(tmp_path / "text"), "--per-line", "--json"]
    options = f"--dynamic {rule} --dynamic-decay 0.01 --dynamic-segment 7 --dynamic-lr 0.02".split()
    if rule == "rms":
        model = TrainedModel.load(path, cpu=True, collapse=False)
        named = model.models[0].named_parameters()
        roots = {name: torch.ones_like(parameter) for name, parameter in named}
        about = {"checkpoint": model.identity.hex(), "segment length": 7, "context": 0}
        Statistics(roots, about).save(tmp_path / "statistics")
        options += ["--dynamic-statistics", str(tmp_path / "statistics")]

    def scored(part, options):
        report = tmp_path / "report.json"
        with monkeypatch.context() as patched:
            patched.setattr(texts, "PART", part)
            assert main([*words, str(report), *options]) == 0
        found = json.loads(report.read_text())
        report.unlink()
        return found, capsys.readouterr().out

    whole = scored(1000, options)
    assert all(scored(part, options) == whole for part in (1, 5, 7, 64))
    static, _ = scored(1000, [])
    assert whole[0]["nats"] < static["nats"] - 10


def test_sums_are_the_same_to_the_last_bit_however_a_text_is_cut():
    lines = [b"%d <b>a word</b>\n" % i for i in range(2000)]
    ends = np.cumsum([len(line) for line in lines])
    values = np.random.RandomState(1).rand(ends[-1])

    def sums(lines_of_part):
        blocks, by_kind = texts.Blocks(), kinds.ByKind()
        for i in range(0, len(lines), lines_of_part):
            part = b"".join(lines[i : i + lines_of_part])
            begin = ends[i] - len(lines[i])
            blocks.add(values[begin : begin + len(part)])
            by_kind.add(part, values[begin : begin + len(part)])
        return blocks.sums.tolist(), by_kind.rows()

    whole = sums(len(lines))
    assert sum(whole[0]) == pytest.approx(values.sum())
    assert all(sums(size) == whole for size in (1, 7, 300))


def test_trained_weights_are_put_back_however_reading_ends(path, monkeypatch):
    model, data = TrainedModel.load(path, cpu=True, collapse=False), text(300)
    parameters = list(model.models[0].parameters())
    before = [parameter.detach().clone() for parameter in parameters]

    def are_trained():
        return all(torch.equal(*pair) for pair in zip(parameters, before))

    def reading(chunks):
        return model.reading(chunks, policy=DYNAMIC)

    static = model.bits(data)
    begun = iter(reading(in_chunks(data, [50])))
    next(begun)
    assert not are_trained()
    begun.close()
    assert are_trained()
    for _ in reading(in_chunks(data, [50])):
        assert not are_trained()
        break
    assert are_trained()
    with pytest.raises(UserError, match="byte 90 at offset 300"):
        list(reading([data, b"Z"]))
    assert are_trained()
    score, _, _ = model.costs(data, policy=DYNAMIC)
    assert are_trained() and score.nats != pytest.approx(static.sum() * math.log(2))

    def interrupt(bar, size):
        assert not are_trained()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trained_model, "PART", 50)
        patched.setattr(trained_model.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt) as held:  # with all frames, as in a session of Python
            model.costs(data, policy=DYNAMIC)
        assert are_trained() and held.traceback
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in parameters)
    assert np.array_equal(model.bits(data), static)


# Memory


# Runs the command with a model that costs no time, and prints the most memory that it had.
MEMORY = """
import resource, sys
import torch
from fairseq_sha import trained_model
from fairseq_sha.commands import main
def losses(model, batch):
    return torch.ones(batch["target"].shape)
trained_model.Reading.__init__.__defaults__ = (losses, None)
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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
    for name, copies in (("small", 6), ("large", 40)):
        (tmp_path / name).write_bytes(unit * copies)
        size, out = peak(
            *["score", "--path", path, "--cpu", "--model-overrides", "{'tokens_per_sample': 5000}"],
            *["--html", tmp_path / f"{name}.html", "--json", tmp_path / f"{name}.json"],
            tmp_path / name,
        )
        assert f"{50_000 * copies:,} tokens" in out
        peaks.append(size)
    # 1.7 MB more text; with eight bytes or more for each of its bytes, a few times over, it grows.
    assert peaks[1] - peaks[0] < 15_000
    assert len(list((tmp_path / "large_pages").glob("page*.html"))) == 11


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


def test_text_that_costs_nothing_has_no_shares():
    counted = kinds.ByKind()
    counted.add(b"ab\n", np.zeros(3))
    assert "| white space | 1 | 0.000 | 33.3% | 0.0% |" in kinds.table(counted.rows())


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


def test_cost_that_is_not_finite_has_the_last_colour_alone():
    bits = np.array([1.0, math.inf, 1.0, math.nan, 1.0])
    colours = [colour for _, colour in Text(picture.picture("", "", b"abcde", bits)).characters]
    assert colours == ["c2", "c15", "c2", "c15", "c2"]


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


# Files


def test_long_lines_and_odd_ends_are_drawn_on_pages_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "PAGE", 1000)
    data = ("h\u00e9" * 700 + "\n" + "ab\n" * 900).encode() + b"\xff" * 1500 + "\u20ac".encode()
    values = np.arange(len(data)) % 11 / 2
    with picture.drawn(tmp_path / "picture.html", "<text>", len(data)) as drawing:
        for begin in range(0, len(data), 77):
            drawing.add(data[begin : begin + 77], values[begin : begin + 77])
        (name,) = os.listdir(tmp_path)
        assert re.fullmatch(r"\.picture_pages\..*\.unfinished", name)
        drawing.finish("<p>summary</p>")
    folder = tmp_path / "picture_pages"
    assert os.listdir(tmp_path) == [folder.name]
    names = [page.name for page in drawing.pages]
    assert sorted(os.listdir(folder)) == sorted(["index.html", *names])
    shown, characters = "", []
    for i, name in enumerate(names):
        page = (folder / name).read_text(encoding="utf-8")
        characters += Text(page).characters
        links = re.findall('href="(.*?)"', page)
        around = names[max(i - 1, 0) : i] + names[i + 1 : i + 2]
        assert sorted(links) == sorted(2 * ["index.html", *around])
        assert "http" not in page
    shown = "".join(character for character, _ in characters)
    assert shown == data.decode("utf-8", "backslashreplace").replace("\n", "\u21b5\n")
    single = Text(picture.picture("<text>", "", data, values)).characters
    assert characters == single
    assert all(page.bytes <= 1000 for page in drawing.pages)
    assert sum(page.bytes for page in drawing.pages) == len(data)
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall('<td><a href="(.*?)"', index) == names
    assert "<p>summary</p>" in index and "<polyline" in index and "&lt;text&gt;" in index
    for page in drawing.pages:
        mean = values[page.start : page.start + page.bytes].mean()
        assert f"<td>{page.start:,}<td>{page.bytes:,}\n<td>{mean:.3f}".replace("\n", "") in index


def test_folder_of_pages_does_not_appear_if_the_work_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "PAGE", 10)
    with pytest.raises(KeyError):
        with picture.drawn(tmp_path / "picture.html", "text", 100) as drawing:
            drawing.add(b"abc\n" * 25, np.zeros(100))
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_curve_shows_the_mean_of_each_stretch():
    blocks, values = texts.Blocks(), np.repeat([1.0, 3.0, 2.0], [texts.BLOCK, texts.BLOCK, 500])
    for begin in range(0, len(values), 3333):
        blocks.add(values[begin : begin + 3333])
    assert blocks.sums.tolist() == [texts.BLOCK, 3 * texts.BLOCK, 1000]
    svg = picture.curve(blocks, [], "bits per byte")
    points = re.search('points="(.*?)"', svg)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights[1] < heights[2] < heights[0]
    assert heights[0] - heights[2] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_report_is_strict_json(path, sha_rnn, tmp_path, capsys):
    data = text(777, seed=5) + b"\nabc"
    (tmp_path / "text").write_bytes(data)
    words = ["score", "--path", path, "--cpu", "--json", str(tmp_path / "report.json")]
    assert main([*words, "--per-line", str(tmp_path / "text")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    score, _, nats = sha_rnn.costs(data)
    assert found["nats"] == score.nats and found["bytes"] == found["tokens"] == len(data)
    assert found["bits_per_byte"] == score.bits_per_byte and found["words"] == score.words
    assert f"{found['bits_per_byte']:.4f} bits per byte" in out
    assert found["policy"] == "state carried, 1 streams, segments of 40"
    assert found["model"]["identity"] == sha_rnn.identity.hex()
    assert found["model"]["arch"] == "sha_rnn" and found["model"]["path"] == path
    assert sum(row["bytes"] for row in found["kinds"]) == len(data)
    assert sum(row["bits"] for row in found["kinds"]) == pytest.approx(found["bits"])
    assert [line["bytes"] for line in found["lines"]] == [
        len(line) for line in data.splitlines(keepends=True)
    ]
    bits = nats.astype(np.float64) / math.log(2)
    for line in found["lines"]:
        expected = bits[line["offset"] :][: line["bytes"]].sum()
        assert line["bits"] == pytest.approx(expected, rel=1e-5)
    assert main([*words, str(tmp_path / "text")]) == 1  # it exists


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_report_of_next_to_nothing(path, tmp_path, capsys, data):
    (tmp_path / "text").write_bytes(data)
    words = ["score", "--path", path, "--cpu", "--json", str(tmp_path / "report.json")]
    assert main([*words, str(tmp_path / "text")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["lines"] == [] and found["tokens"] == found["bytes"] == len(data)
    assert found["words"] == (len(data) or None) and (found["perplexity"] is None) == (not data)


def test_identity_does_not_depend_on_how_a_model_is_read(path, sha_rnn):
    """Dynamic evaluation does not collapse over-parameterised vectors."""
    assert TrainedModel.load(path, cpu=True, collapse=False).identity == sha_rnn.identity


def test_numbers_that_are_not_finite_are_null():
    values = {"a": [math.nan, 1.5, (math.inf, "x")], "b": None}
    assert json.loads(json_report.dumps(values)) == {"a": [None, 1.5, [None, "x"]], "b": None}


def test_pipe_is_read_as_a_file_is(path, tmp_path, capsys):
    data = text(300)
    (tmp_path / "text").write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    words = ["score", "--path", path, "--cpu"]
    assert main([*words, str(tmp_path / "text")]) == 0
    expected = capsys.readouterr().out.split(": ", 1)[1]
    with subprocess.Popen(["sh", "-c", f"cat {tmp_path}/text > {tmp_path}/pipe"]):
        assert main([*words, str(tmp_path / "pipe")]) == 0
    assert capsys.readouterr().out.split(": ", 1)[1] == expected


@pytest.mark.parametrize("size", [1, 5, 100])
def test_long_lines_count_as_several(monkeypatch, size):
    monkeypatch.setattr(texts, "LONGEST_LINE", 10)
    monkeypatch.setattr("fairseq_sha.data.pieces.LONGEST_LINE", 10)
    data = b"abc\n" + b"x" * 37 + b"\n\n" + b"y" * 20
    values = np.arange(len(data), dtype=float)
    parts = [(data[i : i + size], values[i : i + size]) for i in range(0, len(data), size)]
    found = [line for part in texts.whole_lines(parts) for line in texts.lines(*part)]
    expected = [b"abc\n", *[b"x" * 10] * 3, b"xxxxxxx\n", b"\n", b"y" * 10, b"y" * 10]
    assert [line for line, _ in found] == expected
    ends = np.cumsum([len(line) for line in expected])
    sums = [values[end - len(line) : end].sum() for line, end in zip(expected, ends)]
    assert [total for _, total in found] == sums


# Two models


def run_against(paths, data, tmp_path, capsys, *options):
    (tmp_path / "text").write_bytes(data)
    words = ["score", "--path", paths[0], "--against", paths[1], "--cpu", *options]
    assert main([*words, str(tmp_path / "text")]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("part", [texts.PART, 100])
def test_two_models_are_compared_by_byte_line_and_kind(paths, tmp_path, capsys, monkeypatch, part):
    monkeypatch.setattr(texts, "PART", part)
    data = text(2000, seed=6)
    out = run_against(paths, data, tmp_path, capsys, "--json", str(tmp_path / "r.json"))
    a, b = (TrainedModel.load(path, cpu=True).bits(data) for path in paths)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert found["a"]["bits"] == pytest.approx(a.sum())
    assert found["b"]["bits"] == pytest.approx(b.sum())
    value = (a - b).mean()
    assert found["difference"]["bits_per_byte"] == pytest.approx(value)
    assert found["difference"]["low"] is None and not found["difference"]["resolved"]
    assert f"A - B: {value:+.4f} bits per byte; the text is too short" in out
    of_byte = kinds.kinds_of_bytes(data)
    for row in found["kinds"]:
        mask = of_byte == kinds.KINDS.index(row["kind"])
        assert row["bytes"] == mask.sum()
        assert row["a_bits"] == pytest.approx(a[mask].sum())
        assert row["b_bits"] == pytest.approx(b[mask].sum())
        assert f"{(a - b)[mask].sum():+,.0f} |" in out
    lines, offset = [], 0
    for line in data.splitlines(keepends=True):
        gain = (a - b)[offset : offset + len(line)].sum()
        lines.append((gain, offset))
        offset += len(line)
    better_a, better_b = sorted(lines)[:10], sorted(lines, reverse=True)[:10]
    assert [line["offset"] for line in found["a_better"]] == [o for g, o in better_a if g < 0]
    assert [line["offset"] for line in found["b_better"]] == [o for g, o in better_b if g > 0]
    assert found["a_better"] and found["b_better"]
    assert "Lines in which A saves most" in out and "Lines in which B saves most" in out


def test_model_does_not_differ_from_itself(path, tmp_path, capsys):
    data = text(500)
    html = ["--html", str(tmp_path / "picture.html"), "--per-line"]
    out = run_against([path, path], data, tmp_path, capsys, *html)
    assert "A - B: +0.0000 bits per byte" in out and "saves most" not in out
    page = (tmp_path / "picture.html").read_text(encoding="utf-8")
    assert {colour for _, colour in Text(page).characters} == {"c8"}


def test_two_models_read_a_text_side_by_side_wherever_it_is_cut():
    data, values = text(1000), np.arange(1000.0)
    first = [(data[i : i + 70], values[i : i + 70]) for i in range(0, 1000, 70)]
    second = [(data[i : i + 99], -values[i : i + 99]) for i in range(0, 1000, 99)]
    found = list(texts.side_by_side(first, second))
    assert b"".join(part for part, _, _ in found) == data
    assert np.array_equal(np.concatenate([a for _, a, _ in found]), values)
    assert np.array_equal(np.concatenate([b for _, _, b in found]), -values)
    assert list(texts.side_by_side([], [])) == []


@pytest.mark.parametrize(
    "shift, verdict", [(0.1, "resolved"), (-0.1, "resolved"), (0.0, "not resolved")]
)
def test_difference_has_an_interval_over_blocks(shift, verdict):
    random = np.random.RandomState(1)
    a, b = texts.Blocks(), texts.Blocks()
    for _ in range(20):
        hard = random.rand(texts.BLOCK) * 4
        a.add(hard + shift + random.normal(0, 0.05))
        b.add(hard)
    found = difference.difference(a, b)
    assert found.value == pytest.approx((a.sums - b.sums).sum() / a.size)
    assert found.low < found.value < found.high
    means = (a.sums - b.sums) / texts.BLOCK
    assert found.high - found.low == pytest.approx(2 * 1.96 * means.std() / 20**0.5, rel=0.15)
    assert found.is_resolved == (verdict == "resolved")
    assert ("not resolved" in str(found)) == (verdict == "not resolved")
    assert "over 20 blocks of 10,000 bytes" in str(found)


def test_models_that_diverged_are_not_resolved():
    a, b = texts.Blocks(), texts.Blocks()
    a.add(np.full(20 * texts.BLOCK, math.nan))
    b.add(np.ones(20 * texts.BLOCK))
    found = difference.difference(a, b)
    assert not found.is_resolved and "not resolved" in str(found)


def test_blue_is_for_a_and_red_for_b_and_black_text_is_legible():
    scale = picture.DIFFERENCES
    assert scale.index(0.0) == scale.index(0.24) == scale.index(-0.24) == 8
    assert (scale.index(-9), scale.index(-0.3), scale.index(0.3), scale.index(9)) == (0, 7, 9, 16)
    assert scale.index(math.nan) == 16 and picture.COSTS.index(math.inf) == 15
    assert scale.ranges[7] == "A better by 0.25 to 0.75 bits"
    assert scale.ranges[16] == "B better by 3.75 bits or more"
    for colour in [*scale.colours, *picture.COSTS.colours]:
        hue, saturation, lightness = map(float, re.findall(r"[\d.]+", colour))
        rgb = colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / 0.05 > 4.5  # WCAG 2, level AA
    styles = scale.styles()
    assert "hsl(215" in styles[: styles.index(".c8")] and "hsl(10" in styles


@pytest.mark.parametrize(
    "options, message",
    [
        (["--against", "x.pt", "--per-token"], "use --per-line"),
        (["--against-overrides", "{'window': 5}"], "name it with --against"),
        (["--html", "page", "--json", "./page"], "--html page: is also --json; name two files"),
    ],
)
def test_options_that_do_not_fit_together(paths, tmp_path, capsys, options, message):
    assert main(["score", "--path", paths[0], *options, str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
