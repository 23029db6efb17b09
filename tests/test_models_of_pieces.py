"""What users type, with a model of pieces."""

import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest

from fairseq_sha import commands
from fairseq_sha.data import data_bin, piece_data_bin
from fairseq_sha.data.codecs import PieceCodec
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.trained_model import TrainedModel
from tests.commands import command
from tests.options import SHA_RNN
from tests.tiny_corpus import text

TASK = "segment_language_modeling"
#: With what text seldom has.
TEXT = b"  the \xff\n\x00\r\xe2\x96\x81abc\n" + text(400, seed=7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model's folder of data, its checkpoint and what training printed."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "input").write_bytes(text(9000))
    data, save = folder / "data", folder / "run"
    with data_bin.open_input(folder / "input") as stream:
        piece_data_bin.convert(stream, "input", data, 901, 1003, 290)
    options = f"{SHA_RNN} --max-update 8 --save-dir {save} --valid-subset test"
    done = command("fairseq-train", data, f"--codec pieces {options}", task=TASK)
    assert done.returncode == 0, done.stdout
    return data, str(save / "checkpoint_last.pt"), done.stdout


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    """The checkpoint, where its data folder is not."""
    data, path, _ = run
    copy = tmp_path_factory.mktemp("elsewhere") / "model.pt"
    shutil.copy(path, copy)
    return str(copy)


def main(*argv):
    return commands.main([str(word) for word in argv])


def test_validation_counts_tokens_bytes_and_words_of_the_text(run):
    data, _, output = run
    line = re.findall(r"valid on 'test' subset \| (.*)", output)[-1]
    value = {k: float(v) for k, v in re.findall(r"(\S+) ([0-9.]+)(?: \||$)", line)}
    tokens = Corpus(str(data / "test")).tokens
    part = PieceCodec.load(str(data)).decode(tokens)
    predicted = part[len(PieceCodec.load(str(data)).decode(tokens[:1])) :]
    before = part[: len(part) - len(predicted)]
    words = len(part.split()) + part.count(b"\n") - len(before.split()) - before.count(b"\n")
    assert part == text(9000)[-1003:]
    nats = value["nats"] * (len(tokens) - 1)
    assert nats / len(predicted) / math.log(2) == pytest.approx(value["bpb"], abs=2e-4)
    assert nats / words == pytest.approx(math.log(value["wppl"]), abs=2e-3)
    assert value["ppl"] == pytest.approx(math.exp(value["nats"]), rel=1e-3)
    assert re.search(r"train_inner.*nats=\S+, bpb=\S+, .*wppl=", output)


def test_evaluation_counts_every_token_once_in_any_batches(run, tmp_path, capsys):
    data, path, _ = run
    tokens = len(Corpus(str(data / "test")))
    options = f"--codec pieces --path {path} --gen-subset test --batch-size 3 --cpu"
    done = command("fairseq-eval-lm", data, options, task=TASK)
    assert f"Evaluated {tokens} tokens" in done.stdout, done.stdout
    figures = []
    for streams, length in ((1, 500), (3, 1)):
        out = tmp_path / f"{streams}.json"
        options = ("--batch-size", streams, "--tokens-per-sample", length, "--json", out, "--cpu")
        assert main("evaluate", data, "--path", path, "--split", "test", *options) == 0
        figures.append(json.loads(out.read_text()))
    assert [f["tokens"] for f in figures] == [tokens] * 2
    assert figures[0]["bytes"] == figures[1]["bytes"]
    assert figures[0]["words"] == figures[1]["words"]
    test = text(9000)[-1003:]  # whatever the pieces are
    assert {found["sha256"] for found in figures} == {hashlib.sha256(test).hexdigest()}
    assert "per word" in capsys.readouterr().out


def test_prompt_comes_back_before_its_continuation(path, tmp_path, capfdbinary):
    (tmp_path / "prompt").write_bytes(TEXT)
    argv = ["generate", "--path", path, "--cpu", "--prompt-file", tmp_path / "prompt"]
    assert main(*argv, "--length", 30, "--seed", 1) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(TEXT) and len(out) > len(TEXT) + 30
    assert main(*argv, "--length", 5, "--beam", 2) == 0


def test_score(path, tmp_path, capsys):
    (tmp_path / "text").write_bytes(TEXT)
    model = TrainedModel.load(path, cpu=True)
    score, tokens, nats = model.costs(TEXT)
    bits = model.bits(TEXT)
    assert len(bits) == score.bytes == len(TEXT) and score.tokens == len(tokens) < len(TEXT)
    assert bits.sum() == pytest.approx(nats.sum() / np.log(2), rel=1e-5)
    assert score.words == len(TEXT.split()) + TEXT.count(b"\n")
    html = tmp_path / "picture.html"
    argv = ["score", "--path", path, "--cpu", tmp_path / "text", "--html", html]
    assert main(*argv, "--per-token") == 0
    *of_tokens, total = capsys.readouterr().out.splitlines()
    assert main(*argv[:-2], "--per-line") == 0
    *of_lines, same = capsys.readouterr().out.splitlines()
    assert same == total and len(of_tokens) == len(tokens)
    assert [float(line.split("\t")[0]) for line in of_tokens] == pytest.approx(
        list(nats / np.log(2)), abs=1e-3
    )
    assert sum(float(line.split("\t")[1]) for line in of_lines if "\t" in line) == pytest.approx(
        bits.sum(), abs=1
    )
    assert f"{bits.mean():.4f} bits per byte" in total and "when compressed" in total
    assert f"{score.words} words" in total
    assert "\\xff" in html.read_text(encoding="utf-8")


def test_files_come_back_bit_for_bit(path, tmp_path):
    pytest.importorskip("constriction")
    for number, data in enumerate((b"", b"a", TEXT)):
        file = tmp_path / f"file{number}"
        file.write_bytes(data)
        assert main("compress", "--path", path, "--cpu", "--streams", 3, file) == 0
        file.rename(tmp_path / "before")
        assert main("decompress", "--path", path, "--cpu", f"{file}.shac") == 0
        assert file.read_bytes() == data
    assert (tmp_path / "file2.shac").stat().st_size < len(TEXT)


def test_folder_of_another_codec_is_named(run):
    data, path, _ = run
    options = f"--path {path} --cpu"
    done = command("fairseq-eval-lm", data, options, task=TASK)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "its tokens are pieces, not words; use --codec pieces" in done.stdout
