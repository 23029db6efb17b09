"""What tokens are worth: bytes, and words."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sha import UserError
from fairseq_sha.data import pieces
from fairseq_sha.data.codecs import CODECS, PART, ByteCodec, PieceCodec, WordCodec, codec_from_state
from tests.tiny_corpus import text

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
ALL_BYTES = ByteCodec.from_symbols([*SPECIAL, *(str(i) for i in range(256) if i != 10)])
TOKENIZER = pieces.train(pieces.lines([text(20000)]), 300)
PIECE_SYMBOLS = [symbol for symbol in TOKENIZER.get_vocab() if symbol != pieces.NEWLINE]
PIECES = PieceCodec.from_symbols(
    [*SPECIAL, *sorted(PIECE_SYMBOLS), "madeupword0000"], tokenizer=TOKENIZER.to_str()
)
WORDS = WordCodec.from_symbols([*SPECIAL, "the", "cat", "Käse", "madeupword0000"])


@given(st.binary(max_size=300))
def test_bytes_are_lossless(data):
    tokens = ALL_BYTES.encode(data)
    assert tokens.dtype == torch.long and ALL_BYTES.decode(tokens) == data
    assert ALL_BYTES.bytes_per_token()[tokens.numpy()].sum() == len(data)


LIKELY = [
    b"the",
    b" ",
    b" " * 50,
    b"\n",
    b"\r\n",
    b"\0",
    b"\xe2\x96\x81",
    b"\xed\xa0\x80",
    b"<s>",
    b"\x85",
]


@given(st.lists(st.one_of(st.binary(max_size=5), st.sampled_from(LIKELY)), max_size=60))
def test_pieces_are_lossless(parts):
    data = b"".join(parts)
    tokens = PIECES.encode(data)
    assert tokens.dtype == torch.long and PIECES.decode(tokens) == data
    assert not PIECES.is_forbidden(tokens.numpy()).any()
    sizes = PIECES.sizes(data)
    assert sizes.sum() == len(data) and len(sizes) == len(tokens)
    assert PIECES.spread(data, np.ones(len(tokens))).sum() == pytest.approx(len(tokens))


def test_pieces_are_fewer_than_bytes():
    data = text(2000)
    assert len(PIECES.encode(data)) < len(data) / 2
    assert PIECES.encode(b"\n\n").tolist() == [PIECES.dictionary.eos()] * 2


@given(
    st.lists(st.sampled_from([b"the", b"a", b" ", b"\n", b"\t", b"\xc3\xa9", b"."]), max_size=40)
)
def test_all_codecs_count_the_same_words(parts):
    """Runs that are not white space, and ends of lines."""
    data = b"".join(parts)
    expected = len(data.split()) + data.count(b"\n")
    for codec in (ALL_BYTES, PIECES, WORDS):
        tokens = codec.encode(data).numpy()
        before = np.append(codec.start, tokens)[:-1]
        assert codec.words.begun(tokens, before).sum() == expected


def test_words_are_read_and_written_as_wikitext_has_them():
    text = "the cat \nKäse \n\nthe ".encode()
    tokens = WORDS.encode(text)
    assert [WORDS.dictionary[int(i)] for i in tokens] == [
        *("the", "cat", "</s>", "Käse", "</s>", "</s>", "the")
    ]
    assert WORDS.decode(tokens) == text
    assert WORDS.bytes_per_token()[tokens.numpy()].sum() == len(text)
    assert (WORDS.words.begun(tokens.numpy(), np.full(7, 2)) == 1).all()


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


@pytest.mark.parametrize("codec", [ALL_BYTES, PIECES, WORDS])
def test_tokens_without_text_are_forbidden_in_a_corpus(codec):
    size = len(codec.dictionary)
    forbidden = codec.is_forbidden(np.arange(size + 2))
    assert forbidden[[0, 1, size, size + 1]].all() and not forbidden[[2, 4]].any()
    # An unknown byte has no honest probability.
    assert forbidden[3] == codec.lossless
    assert forbidden[size - 1] == (codec is not ALL_BYTES)  # madeupword0000
    not_generated = codec.not_generated()
    assert (3 in not_generated) == codec.lossless and 4 not in not_generated
    assert (size - 1 in not_generated) == (codec is not ALL_BYTES)


def test_codecs_come_from_a_folder_or_a_checkpoint(tmp_path):
    WORDS.dictionary.save(str(tmp_path / "dict.txt"))
    loaded = CODECS["words"].load(str(tmp_path))
    assert loaded.dictionary.symbols[:8] == WORDS.dictionary.symbols[:8]
    assert codec_from_state(WORDS.state()).dictionary == WORDS.dictionary
    with pytest.raises(UserError, match="'the' is not a byte value"):
        CODECS["bytes"].load(str(tmp_path))
    with pytest.raises(UserError, match="dict.txt: no such file"):
        CODECS["words"].load(str(tmp_path / "none"))


def test_bytes_are_not_taken_for_words(tmp_path):
    """Otherwise byte 97 would count as a word of three bytes."""
    ALL_BYTES.dictionary.save(str(tmp_path / "dict.txt"))
    with pytest.raises(UserError, match="its tokens are bytes, not words; use --codec bytes"):
        CODECS["words"].load(str(tmp_path))


def test_pieces_come_from_a_folder_or_a_checkpoint(tmp_path):
    PIECES.dictionary.save(str(tmp_path / "dict.txt"))
    with pytest.raises(UserError, match="pieces.json: no such file"):
        PieceCodec.load(str(tmp_path))
    for content in (b"\xff", b"{", b"[]", b"{}"):
        (tmp_path / "pieces.json").write_bytes(content)
        with pytest.raises(UserError, match="pieces.json: not a tokenizer"):
            PieceCodec.load(str(tmp_path))
    (tmp_path / "pieces.json").write_text(pieces.train([], 256).to_str(), encoding="utf-8")
    with pytest.raises(UserError, match="have different pieces"):
        PieceCodec.load(str(tmp_path))
    (tmp_path / "pieces.json").write_text(TOKENIZER.to_str(), encoding="utf-8")
    for codec in (PieceCodec.load(str(tmp_path)), codec_from_state(PIECES.state())):
        assert codec.encode(b"the cat").tolist() == PIECES.encode(b"the cat").tolist()
        assert codec.dictionary.symbols == PIECES.dictionary.symbols
    with pytest.raises(UserError, match="its tokens are pieces, not words; use --codec pieces"):
        WordCodec.load(str(tmp_path))


def test_only_cutting_text_into_pieces_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    codec = codec_from_state(PIECES.state())
    assert codec.decode(range(len(codec.dictionary))) == PIECES.decode(range(len(codec.dictionary)))
    with pytest.raises(UserError, match=r"pip install 'fairseq-sha\[pieces\]'"):
        codec.encode(b"the")


def test_old_checkpoints_do_not_name_their_codec():
    assert codec_from_state({"symbols": [*SPECIAL, "97"]}).decode([4]) == b"a"
    with pytest.raises(UserError, match="its codec 'runes' is unknown"):
        codec_from_state({"symbols": SPECIAL, "codec": "runes"})


SPACED = [*LIKELY[:-2], b"\xc3\xa9", b" a", "\u00a0".encode(), "\u2003x".encode(), b"the \n  cat"]


@settings(deadline=None)
@given(
    st.sampled_from([ALL_BYTES, PIECES, WORDS]),
    st.lists(st.sampled_from([part for part in SPACED if part != b"\xed\xa0\x80"]), max_size=40),
    st.integers(1, 30),
)
def test_text_in_parts_has_the_tokens_and_costs_of_the_whole_text(codec, words, size):
    data = b"".join(words)
    parts = list(codec.parts(data[i : i + size] for i in range(0, len(data), size)))
    assert b"".join(part for part, _ in parts) == data
    tokens = codec.encode(data).numpy()
    assert np.array_equal(np.concatenate([tokens[:0], *(found for _, found in parts)]), tokens)
    costs = np.random.RandomState(1).rand(len(tokens))
    ends = np.cumsum([0, *(len(found) for _, found in parts)])
    spread = [codec.spread(part, costs[i:j]) for (part, _), i, j in zip(parts, ends, ends[1:])]
    assert np.array_equal(np.concatenate([np.zeros(0), *spread]), codec.spread(data, costs))


def test_parts_of_long_texts_are_short():
    def longest(codec, data):
        chunks = (data[i : i + 1000] for i in range(0, len(data), 1000))
        return max(len(part) for part, _ in codec.parts(chunks))

    lines, line = b"the cat\n" * 20_000, b"the cat " * 20_000
    assert longest(ALL_BYTES, lines) == 1000
    assert longest(WORDS, lines) < 1100 and longest(WORDS, line) < 1100
    assert longest(PIECES, lines) < PART + 10


@pytest.mark.parametrize("codec", [ALL_BYTES, WORDS], ids=["bytes", "words"])
def test_offset_of_what_cannot_be_read_is_that_in_the_text(codec):
    codec = ByteCodec.from_symbols([*SPECIAL, "97", "32"]) if codec is ALL_BYTES else codec
    data = b"a " * 1000 + b"\n" + b"\xff"
    with pytest.raises(UserError, match=r"byte 255 at offset 2001 of the text"):
        codec.check(data[i : i + 77] for i in range(0, len(data), 77))
