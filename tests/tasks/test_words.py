"""The general task, on words."""

import math
import re

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from fairseq_sha.data.codecs import WordCodec
from fairseq_sha.data.corpus import Corpus
from tests.commands import command
from tests.options import SHA_RNN

WORDS = "the of and a river mountain \u00e9t\u00e9".split()
TASK = "segment_language_modeling"


def write_words(folder):
    """Lines of seven words; returns how many bytes and tokens of the test split are predicted."""
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    dictionary.save(str(folder / "dict.txt"))
    chosen = np.random.RandomState(1)
    for split, lines in (("train", 300), ("valid", 40), ("test", 30)):
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        for _ in range(lines):
            line = " ".join(chosen.choice(WORDS, 7))
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).long())
        builder.finalize(str(folder / f"{split}.idx"))
    targets = Corpus(str(folder / "test")).tokens[1:]
    return int(WordCodec.load(str(folder)).bytes_per_token()[targets].sum()), 8 * 30 - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data, folder = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("run")
    size = write_words(data)
    options = f"{SHA_RNN} --max-update 8 --save-dir {folder} --valid-subset test"
    done = command("fairseq-train", data, options, task=TASK)
    assert done.returncode == 0, done.stdout
    return data, folder, size, done.stdout


def test_scores_are_per_token_word_and_byte_of_the_text(run):
    _, _, (nbytes, ntokens), output = run
    line = re.findall(r"valid on 'test' subset \| (.*)", output)[-1]
    value = {k: float(v) for k, v in re.findall(r"(\S+) ([0-9.]+)(?: \||$)", line)}
    assert value["nats"] * ntokens / nbytes / math.log(2) == pytest.approx(value["bpb"], abs=2e-4)
    assert value["loss"] == pytest.approx(value["nats"] / math.log(2), abs=1e-3)
    assert value["ppl"] == pytest.approx(math.exp(value["nats"]), abs=0.02)
    assert value["wppl"] == pytest.approx(value["ppl"], abs=0.02)
    assert "bpc" not in value
    assert re.search(r"train_inner.*nats=\S+, bpb=\S+, .*wppl=", output)


def test_evaluation_counts_every_token_once(run):
    data, folder, (_, ntokens), _ = run
    options = f"--path {folder}/checkpoint_last.pt --gen-subset test --batch-size 3 --cpu"
    done = command("fairseq-eval-lm", data, options, task=TASK)
    assert f"Evaluated {ntokens} tokens" in done.stdout, done.stdout


def test_another_codec_is_refused(run):
    data, folder, _, _ = run
    options = f"--path {folder}/checkpoint_last.pt --cpu"
    done = command("fairseq-eval-lm", data, options)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "'the' is not a byte value" in done.stdout.strip().splitlines()[-1]
