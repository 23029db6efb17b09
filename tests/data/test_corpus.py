import os

import numpy as np
import pytest

from fairseq_sha import UserError
from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from tests.tiny_corpus import write_split


def test_reads_all_items_as_one_array(tmp_path):
    data = b"one\n\ntwo three\nfour"
    corpus = Corpus(write_split(data, tmp_path))
    dictionary = ByteDictionary.load(str(tmp_path / "dict.txt"))
    assert dictionary.decode(corpus.tokens) == data
    assert corpus.total_tokens == len(data) and len(corpus) == len(data) - 1
    assert isinstance(corpus.tokens, np.memmap)


def test_finds_the_first_token_of_a_kind(tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq_sha.data.corpus.TOKENS_AT_ONCE", 4)
    corpus = Corpus(write_split(b"aaaaaaabab", tmp_path))
    assert corpus.find(lambda tokens: tokens == corpus.tokens[7]) == 7
    assert corpus.find(lambda tokens: tokens == corpus.tokens[0]) == 0
    assert corpus.find(lambda tokens: tokens > 99) is None


def test_counts_each_token(tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq_sha.data.corpus.TOKENS_AT_ONCE", 4)
    corpus = Corpus(write_split(b"aaaaaaabab", tmp_path))
    expected = np.bincount(corpus.tokens)
    assert (corpus.counts(0) == expected).all()
    counts = corpus.counts(99)
    assert (counts[: len(expected)] == expected).all() and counts.sum() == 10
    assert len(counts) == 99


def damage(path, how):
    if how == "missing":
        os.remove(path)
    elif how == "empty":
        open(path, "wb").close()
    elif how == "truncated":
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) - 3)
    else:
        with open(path, "wb") as file:
            file.write(b"not at all what it should be" * 10)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "foreign"])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_damaged_files_are_named(tmp_path, suffix, how):
    prefix = write_split(b"one\ntwo\n" * 50, tmp_path)
    damage(prefix + suffix, how)
    with pytest.raises(UserError, match="preprocess the corpus") as error:
        Corpus(prefix)
    assert prefix + suffix in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_predict(tmp_path):
    with pytest.raises(UserError, match="fewer than two tokens"):
        Corpus(write_split(b"a", tmp_path))
