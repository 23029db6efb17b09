"""What tokens are worth: bytes, and words."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_sha import UserError
from fairseq_sha.data.codecs import CODECS, ByteCodec, WordCodec

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
ALL_BYTES = ByteCodec.from_symbols([*SPECIAL, *(str(i) for i in range(256) if i != 10)])
WORDS = WordCodec.from_symbols([*SPECIAL, "the", "cat", "Käse", "madeupword0000"])


@given(st.binary(max_size=300))
def test_bytes_are_lossless(data):
    tokens = ALL_BYTES.encode(data)
    assert tokens.dtype == torch.long and ALL_BYTES.decode(tokens) == data
    assert ALL_BYTES.bytes_per_token()[tokens.numpy()].sum() == len(data)


def test_words_are_read_and_written_as_wikitext_has_them():
    text = "the cat \nKäse \n\nthe ".encode()
    tokens = WORDS.encode(text)
    assert [WORDS.dictionary[int(i)] for i in tokens] == [
        *("the", "cat", "</s>", "Käse", "</s>", "</s>", "the")
    ]
    assert WORDS.decode(tokens) == text
    assert WORDS.bytes_per_token()[tokens.numpy()].sum() == len(text)
    assert WORDS.is_word()[tokens.numpy()].all() and not WORDS.is_word()[[0, 1, 7]].any()


def test_unknown_words_are_a_token_like_any_other():
    tokens = WORDS.encode(b"the dog ")
    assert tokens[1] == WORDS.dictionary.unk() and not WORDS.is_forbidden(tokens.numpy()).any()
    assert WORDS.decode(tokens) == b"the <unk> " and not WORDS.lossless
    assert WORDS.not_generated() == [7]


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(UserError, match="byte 255 at offset 4 of the text is not UTF-8"):
        WORDS.encode(b"the \xff")
    some = ByteCodec.from_symbols([*SPECIAL, "97"])
    with pytest.raises(UserError, match="byte 98 at offset 2 .*--all-bytes"):
        some.encode(b"aab")


@pytest.mark.parametrize("codec", [ALL_BYTES, WORDS])
def test_tokens_without_text_are_forbidden_in_a_corpus(codec):
    size = len(codec.dictionary)
    forbidden = codec.is_forbidden(np.arange(size + 2))
    assert forbidden[[0, 1, size, size + 1]].all() and not forbidden[[2, 4]].any()
    assert forbidden[3] == (codec is ALL_BYTES)  # an unknown byte has no honest probability


def test_codecs_come_from_a_folder_or_a_checkpoint(tmp_path):
    WORDS.dictionary.save(str(tmp_path / "dict.txt"))
    loaded = CODECS["words"].load(str(tmp_path))
    assert loaded.dictionary.symbols[:8] == WORDS.dictionary.symbols[:8]
    with pytest.raises(UserError, match="'the' is not a byte value"):
        CODECS["bytes"].load(str(tmp_path))
    with pytest.raises(UserError, match="dict.txt: no such file"):
        CODECS["words"].load(str(tmp_path / "none"))
