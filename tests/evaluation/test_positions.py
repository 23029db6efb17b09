"""What predictions cost by how much they can see."""

import json
import re

import numpy as np
import pytest

from fairseq_sha.commands import main
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.evaluation import positions
from fairseq_sha.evaluation.policies import Carried, Sliding
from tests import random_checkpoint
from tests.evaluation.test_evaluate import Text
from tests.tiny_corpus import write_folder


@pytest.fixture
def codec():
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(str(value) for value in range(97, 109))]
    return ByteCodec.from_symbols(symbols)


def distances(codec, policy, size):
    text = Text(size + 1, 16)
    return positions.distances(policy, policy.batches(text, "test", codec), size)


def test_streams_start_from_nothing_and_segments_go_on(codec):
    found = distances(codec, Carried(2, 3), 13)
    # Streams of 7 and 6 predictions.
    assert found["stream"].tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6]
    assert found["segment"].tolist() == [1, 2, 3, 1, 2, 3, 1, 1, 2, 3, 1, 2, 3]
    found = distances(codec, Carried(2, 3, has_state=False), 13)
    assert list(found) == ["segment"]


def test_windows_read_their_context_again(codec):
    found = distances(codec, Sliding(2, 3, 2), 9)
    # The first two windows lack some of the context.
    assert found["window"].tolist() == [1, 2, 3, 4, 4, 5, 4, 5, 4]


def test_bins_hold_each_prediction_once():
    distance = np.array([1, 2, 3, 4, 7, 8, 9, 1])
    nats, sizes = np.log(2) * np.arange(8.0), np.array([1, 2, 1, 1, 1, 0, 3, 1])
    rows = positions.by_position(distance, nats, sizes)
    spans = [(row["first"], row["last"], row["tokens"], row["bytes"]) for row in rows]
    assert spans == [(1, 1, 2, 2), (2, 3, 2, 3), (4, 7, 2, 2), (8, 9, 2, 3)]
    assert [row["bits"] for row in rows] == pytest.approx([7, 3, 7, 11])
    table = positions.table("stream", rows)
    assert "| 2 to 3 | 2 | 1.0000 |" in table and "| 1 | 2 | 3.5000 |" in table


def test_command_counts_each_prediction_once(tmp_path, capsys):
    data = write_folder(tmp_path)
    path = random_checkpoint.write(tmp_path / "model.pt", ByteCodec.load(data))
    words = ["evaluate", data, "--path", path, "--cpu", "--batch-size", "4", "--by-position"]
    assert main([*words, "--json", str(tmp_path / "score.json")]) == 0
    output = capsys.readouterr().out
    score = json.loads((tmp_path / "score.json").read_text())
    assert set(score["by_position"]) == {"stream", "segment"}
    for start, longest in (("stream", 208), ("segment", 40)):
        rows = score["by_position"][start]
        assert rows[-1]["last"] == longest
        assert sum(row["tokens"] for row in rows) == score["tokens"] == 832
        bits = sum(row["bits"] for row in rows)
        assert bits == pytest.approx(score["bits_per_byte"] * 832, rel=1e-5)
        assert rows[0]["tokens"] == (4 if start == "stream" else 4 * 6)
        assert f"| tokens since the start of the {start} | tokens |" in output
    assert re.search(r"^\| 128 to 208 \| 324 \|", output, re.MULTILINE)
    assert main(words[:-1]) == 0
    assert "since the start" not in capsys.readouterr().out
