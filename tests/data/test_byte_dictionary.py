import pytest

from fairseq_sha import UserError
from fairseq_sha.data.byte_dictionary import ByteDictionary


@pytest.fixture
def dictionary(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("97 5\n98 4\n226 1\n130 1\n172 1\nmadeupword0000 0\n")
    return ByteDictionary.load(str(path))


def test_bytes_to_ids_and_back(dictionary):
    tokens = dictionary.encode(b"ab\n\xe2a")
    assert tokens.tolist() == [4, 5, dictionary.eos(), 6, 4]
    assert dictionary.decode(tokens) == b"ab\n\xe2a"


def test_symbols_that_are_no_bytes_are_left_out(dictionary):
    made_up = dictionary.index("madeupword0000")
    special = [dictionary.bos(), dictionary.pad(), dictionary.unk(), made_up]
    assert dictionary.decode([*special, 4]) == b"a"


def test_text_keeps_newlines_and_gets_none(dictionary):
    tokens = dictionary.encode_line("a\n\u20ac", add_if_not_exist=False)
    assert dictionary.string(tokens) == "a\n\u20ac"


def test_invalid_utf8_is_shown_as_such(dictionary):
    assert dictionary.string(dictionary.encode(b"a\xe2b")) == "a\ufffdb"


def test_unseen_byte_is_refused(dictionary):
    with pytest.raises(UserError, match="byte 122 at offset 2"):
        dictionary.encode(b"abz")


@pytest.mark.parametrize(
    "text, message",
    [
        ("hello 5\n", "'hello' is not a byte value"),
        ("256 5\n", "'256' is not a byte value"),
        ("007 5\n", "'007' is not a byte value"),
        ("97 five\n", "not a dictionary"),
        ("97 5\n97 5\n", "not a dictionary"),
    ],
)
def test_other_dictionaries_are_refused(tmp_path, text, message):
    path = tmp_path / "dict.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        ByteDictionary.load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_dictionary_is_named(tmp_path):
    with pytest.raises(UserError, match="dict.txt: no such file"):
        ByteDictionary.load(str(tmp_path / "dict.txt"))
