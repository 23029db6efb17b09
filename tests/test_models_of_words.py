"""The commands with a model of words."""

import re

import numpy as np
import pytest

from fairseq_sha import commands
from fairseq_sha.data.codecs import WordCodec
from fairseq_sha.trained_model import TrainedModel
from tests.commands import command
from tests.options import SHA_RNN
from tests.tasks.test_words import write_words


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    data, folder = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("run")
    write_words(data)
    training = f"{SHA_RNN} --max-update 4 --save-dir {folder}"
    done = command("fairseq-train", data, training, task="segment_language_modeling")
    assert done.returncode == 0, done.stdout
    return str(folder / "checkpoint_last.pt")


def test_bits_per_byte_are_those_of_the_file(path, tmp_path, capsys):
    data = "  the river   zebra\nété <pad> a".encode()
    (tmp_path / "text").write_bytes(data)
    model = TrainedModel.load(path, cpu=True)
    score, tokens, nats = model.costs(data)
    bits = model.bits(data)
    assert len(bits) == score.bytes == len(data) and len(tokens) == 7
    assert bits.sum() == pytest.approx(nats.sum() / np.log(2), rel=1e-5)
    assert np.allclose(bits[:6], nats[0] / np.log(2) / 6)
    assert len(model.bits(b" ")) == 1
    argv = ["score", "--path", path, "--cpu", "--per-line", str(tmp_path / "text")]
    assert commands.main(argv) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == data.decode().split("\n")
    assert f"{bits.mean():.4f} bits per byte" in total and f"{len(data)} bytes" in total
    assert "2 unknown words" in total and "compressed" not in total


def test_prompt_and_continuation_are_apart(path, capfdbinary):
    argv = ["generate", "--path", path, "--cpu", "--prompt", "the river", "--length", "5"]
    assert commands.main([*argv, "--beam", "1"]) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(b"the river ") and len(re.findall(rb"\S+|\n", out)) == 2 + 5 + 1


def test_words_cannot_be_compressed(path, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"the river")
    assert commands.main(["compress", "--path", path, "--cpu", str(tmp_path / "text")]) == 1
    assert "does not restore every byte" in capsys.readouterr().err


def test_names_of_special_symbols_are_words_like_any_other():
    codec = WordCodec.from_symbols(["<s>", "<pad>", "</s>", "<unk>", "the"])
    assert codec.encode(b"the <s> <pad> </s> <unk>").tolist() == [4, 3, 3, 3, 3]
    assert codec.sizes(b" the\t\n <s>").tolist() == [5, 2, 3]
    assert codec.encode(b" ").tolist() == codec.sizes(b" ").tolist() == []
