"""Answers that greedy prediction gets right."""

import json

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

from fairseq_sha.commands import main
from fairseq_sha.data.codecs import ByteCodec, WordCodec
from fairseq_sha.evaluation.answers import mistakes, places
from fairseq_sha.models.sha_rnn import SHARNN, SHARNNConfig, SHARNNDecoder
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.tasks.test_words import write_words
from tests.tiny_corpus import text, write_folder


def test_an_answer_is_what_follows_the_mark_in_its_line():
    data = b"\nab/cd\nab\n/b\na/b/c\n"
    is_answer, line = places(np.frombuffer(data, np.uint8), ord("/"), ord("\n"))
    shown = bytes(byte if kept else ord(".") for byte, kept in zip(data, is_answer))
    assert shown == b"....cd.....b...b/c."
    assert line.tolist() == [0, *[1] * 6, *[2] * 3, *[3] * 3, *[4] * 6]


def test_command_counts_what_greedy_prediction_gets_right(tmp_path, capsys):
    data = write_folder(tmp_path)
    codec = ByteCodec.load(data)
    path = random_checkpoint.write(tmp_path / "model.pt", codec, family="min_rnn")
    words = ["evaluate", data, "--path", path, "--cpu", "--answers-after", "a"]
    assert main([*words, "--json", str(tmp_path / "score.json")]) == 0
    found = json.loads((tmp_path / "score.json").read_text())["answers"]

    model = TrainedModel.load(path, cpu=True)
    test = text(833, 3)
    tokens = model.encode(test)
    with torch.no_grad():
        logits = model.decoder(tokens[None, :-1])[0][0]
    right = (logits.argmax(-1) == tokens[1:]).tolist()
    costs = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").tolist()
    expected, position, nats = [], -1, 0.0
    for line in test.split(b"\n"):
        marked = line.find(b"a")
        places_of_answer = range(marked + 1, len(line)) if marked >= 0 else []
        # The prediction before the first of all tokens does not exist.
        own = [position + place for place in places_of_answer]
        if own:
            expected.append([right[i] for i in own])
            nats += sum(costs[i] for i in own)
        position += len(line) + 1
    assert found["lines"] == len(expected) > 10
    assert found["tokens"] == sum(map(len, expected))
    assert found["correct"] == sum(map(sum, expected)) > 0
    assert found["lines_correct"] == sum(map(all, expected))
    assert found["bits"] == pytest.approx(nats / np.log(2), rel=1e-4)
    assert f"of {found['tokens']:,} tokens of answers right" in capsys.readouterr().out


@pytest.mark.parametrize("cutoffs", [[], [7, 15]])
def test_mistakes_are_those_of_the_logits(cutoffs):
    """With an adaptive softmax, what the model returns for a batch are no logits."""
    torch.manual_seed(1)
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(str(i))
    sizes = {"width": 16, "num_layers": 1, "attention_layers": [], "initialisation": "torch"}
    cfg = SHARNNConfig(cutoffs=cutoffs, div_val=2.0, **sizes)
    model = SHARNN(SHARNNDecoder(cfg, dictionary)).eval()
    tokens = torch.randint(dictionary.eos(), len(dictionary), (3, 30))
    features, _ = model.decoder.extract_features(tokens)
    greedy = model.decoder.output_layer(features).argmax(-1)
    targets = torch.where(torch.rand(3, 30) < 0.5, greedy, tokens)
    net_input = {"src_tokens": tokens, "src_lengths": None}
    with torch.no_grad():
        wrong = mistakes(model, {"net_input": net_input, "target": targets})
    assert torch.equal(wrong, (greedy != targets).float()) and 0 < wrong.mean() < 1


@pytest.mark.parametrize(
    "mark, message",
    [("ab", "not one token"), ("z", "byte 122"), ("\udcff", "byte 255"), ("", "not one token")],
)
def test_refusals(tmp_path, capsys, mark, message):
    data = write_folder(tmp_path)
    path = random_checkpoint.write(tmp_path / "model.pt", ByteCodec.load(data))
    assert main(["evaluate", data, "--path", path, "--cpu", "--answers-after", mark]) == 1
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1
    assert "bits per byte" not in out  # nothing was read


def test_a_mark_without_answers_is_found_before_reading(tmp_path, capsys):
    (data := tmp_path / "data").mkdir()
    write_words(data)
    with open(data / "dict.txt", "a") as file:
        file.write("absent 1\n")
    path = random_checkpoint.write(tmp_path / "model.pt", WordCodec.load(data))
    for mark, message in (
        ("zebra", "not one token of the model"),  # an unknown word is like any other
        ("absent", "no line of test has an answer after this mark; give the one"),
    ):
        assert main(["evaluate", str(data), "--path", path, "--cpu", "--answers-after", mark]) == 1
        out, error = capsys.readouterr()
        assert message in error and "bits per byte" not in out
