"""Codecs: what the tokens of a dictionary are worth as text.

Whatever turns text into tokens, tokens into text, or a cost per token into a cost per byte asks the
codec. A checkpoint names its codec and lists its symbols, so that it needs no other file.
"""

import abc
import functools
import json
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_sha.data import pieces
from fairseq_sha.data.byte_dictionary import ByteDictionary, is_of_bytes, load_dictionary
from fairseq_sha.errors import UserError

#: Bytes of a text that are read at once.
PART = 1 << 16


class Words(NamedTuple):
    """Where words begin: a word is a run of bytes that are not white space, or the end of a line.
    White space is ASCII's, and the newline is both white space and the end of a line.

    Counted by tokens this is exact, whatever they are, since whether a word begins in a token
    depends on the token's bytes and on the last byte before it. A text whose first token is not
    predicted has the words that begin in the tokens that are.
    """

    inside: np.ndarray  # [V], int64: words that begin after the first byte, and ends of lines
    first: np.ndarray  # [V], bool: the first byte is not white space
    space: np.ndarray  # [V], bool: the last byte is white space

    @classmethod
    def of(cls, texts):
        """For tokens that stand for these texts, a list of bytes ``[V]``."""
        return cls(
            np.array([len(re.findall(rb"(?<=\s)\S|\n", text)) for text in texts], np.int64),
            np.array([bool(text) and not text[:1].isspace() for text in texts], bool),
            np.array([text[-1:].isspace() for text in texts], bool),
        )

    def begun(self, tokens, before):
        """How many words begin in each token.

        Args:
            tokens (ndarray): token ids, of any shape
            before (ndarray): the token before each of them

        Returns:
            int64 array of that shape
        """
        return self.inside[tokens] + (self.first[tokens] & self.space[before])


class Codec(abc.ABC):
    """What a token is worth. ``V`` is the size of the vocabulary.

    Args:
        dictionary (~fairseq.data.Dictionary): the symbols of token ids
    """

    #: The name under which checkpoints and ``--codec`` know it.
    name = None
    #: Whether ``decode(encode(text))`` is ``text`` for every text that can be encoded.
    lossless = False
    #: Whether training and validation log perplexity per word.
    logs_words = False
    dictionary_type = Dictionary

    def __init__(self, dictionary):
        self.dictionary = dictionary
        #: The token id that stands before the beginning of a text.
        self.start = dictionary.eos()

    @classmethod
    def load(cls, folder):
        """The codec of a data folder, from its ``dict.txt``.

        Raises:
            UserError: the file is missing or malformed
        """
        return cls(load_dictionary(cls.dictionary_type.load, os.path.join(folder, "dict.txt")))

    def state(self):
        """What a checkpoint keeps of the codec, for :meth:`from_state`: a dict of what torch loads
        safely. ``codec`` is the name, ``symbols`` the list of all symbols, special ones included.
        """
        return {"codec": self.name, "symbols": self.dictionary.symbols}

    @classmethod
    def from_state(cls, state):
        """The codec of a checkpoint, from its :meth:`state`.

        Raises:
            UserError: no dictionary of fairseq has these symbols in this order
        """
        return cls.from_symbols(state["symbols"])

    @classmethod
    def from_symbols(cls, symbols, **kwargs):
        """A codec from the list of all symbols, special ones included.

        Args:
            symbols (list of str): as above
            **kwargs: further arguments of the class

        Raises:
            UserError: as :meth:`from_state`
        """
        dictionary = cls.dictionary_type()
        for symbol in symbols[dictionary.nspecial :]:
            dictionary.add_symbol(symbol)
        if dictionary.symbols != list(symbols):
            raise UserError("the checkpoint's symbols are not a dictionary's; name another one")
        return cls(dictionary, **kwargs)

    @abc.abstractmethod
    def encode(self, data, offset=0):
        """Token ids of a text: bytes to LongTensor ``[length]``.

        Args:
            data (bytes): the text, or a part that :meth:`cut` gave
            offset (int): of the part, for messages

        Raises:
            UserError: something in it cannot be encoded
        """

    @abc.abstractmethod
    def cut(self, chunks):
        """Cut a text where no token is cut, so that a large one need not be in memory.

        Args:
            chunks (iterable of bytes): the text, in pieces of any size

        Yields:
            bytes: parts of the text that are encoded, and whose costs are spread, one by one with
            the result for the whole text
        """

    def parts(self, chunks):
        """The parts of a text, as :meth:`cut` gives them, and their tokens: pairs of bytes and an
        int64 array.

        Raises:
            UserError: as :meth:`encode`
        """
        offset = 0
        for text in self.cut(chunks):
            yield text, self.encode(text, offset).numpy()
            offset += len(text)

    def check(self, chunks):
        """Raise the UserError that :meth:`encode` would raise for a text. Argument as for
        :meth:`cut`."""
        for _ in self.parts(chunks):
            pass

    @abc.abstractmethod
    def texts(self):
        """The text that each token stands for: a list of bytes ``[V]``."""

    @functools.cached_property
    def _texts(self):
        return self.texts()

    def decode(self, tokens):
        """The text that a sequence of token ids stands for, as bytes."""
        return b"".join(self._texts[int(token)] for token in tokens)

    def bytes_per_token(self):
        """How many bytes of text each token stands for: int64 array ``[V]``."""
        return np.array([len(text) for text in self._texts], np.int64)

    @functools.cached_property
    def words(self):
        """Where words begin (:class:`Words`)."""
        return Words.of(self._texts)

    @abc.abstractmethod
    def sizes(self, data):
        """How many bytes of a text each of its tokens stands for: int64 array ``[length]``. They
        add up to ``len(data)``, unless there are no tokens."""

    def spread(self, data, costs):
        """Costs per token as costs per byte of text: the cost of a token of several bytes is spread
        evenly over them.

        Args:
            data (bytes): the text
            costs (ndarray): of each of its tokens, ``[length]``

        Returns:
            float64 array ``[len(data)]``
        """
        if not len(costs):
            return np.zeros(len(data))
        sizes = self.sizes(data)
        return np.repeat(costs.astype(np.float64) / sizes, sizes)

    def is_forbidden(self, tokens):
        """Which token ids of an array no corpus may hold: those that the dictionary lacks, and
        those that stand for no text. If they did, as an unknown byte, they would be scored as if
        one symbol stood for all."""
        silent = np.append(self.bytes_per_token() == 0, True)
        return silent[np.minimum(tokens.astype(np.int64), len(self.dictionary))]

    def not_generated(self):
        """Token ids that generation must never choose, besides ``<s>`` and ``<pad>``: a list."""
        unknown = self.dictionary.unk()
        return [i for i, text in enumerate(self._texts) if i >= unknown and not text]


class ByteCodec(Codec):
    """A token is a byte, see :class:`~fairseq_sha.data.byte_dictionary.ByteDictionary`."""

    name = "bytes"
    lossless = True
    dictionary_type = ByteDictionary

    def encode(self, data, offset=0):
        return self.dictionary.encode(data, offset)

    def cut(self, chunks):
        return filter(None, chunks)

    def sizes(self, data):
        return np.ones(len(data), np.int64)

    def decode(self, tokens):
        return self.dictionary.decode(tokens)

    def texts(self):
        return [b"" if v is None else bytes([v]) for v in self.dictionary.bytes_by_id()]


# A word, or the end of a line.
_WORD = re.compile(r"\S+|\n")


class WordCodec(Codec):
    """A token is a word or, as ``</s>``, the end of a line: text as ``fairseq-preprocess`` splits
    it. Words that the dictionary lacks are ``<unk>``, an ordinary token.

    A word stands for its UTF-8 bytes and the space after it, and ``</s>`` for the newline. How
    white space was spread in the text is lost. A line without a space at its end has one byte less
    than is counted, and one with a space at both ends, as in WikiText, one byte more.
    """

    name = "words"
    logs_words = True

    @classmethod
    def load(cls, folder):
        if os.path.exists(os.path.join(folder, pieces.FILE)):
            raise UserError(f"{folder}: its tokens are pieces, not words; use --codec pieces")
        codec = super().load(folder)
        if is_of_bytes(codec.dictionary):
            raise UserError(f"{folder}: its tokens are bytes, not words; use --codec bytes")
        return codec

    def encode(self, data, offset=0):
        tokens = [self._token(match[0]) for match in _WORD.finditer(_text(data, offset))]
        return torch.tensor(tokens, dtype=torch.long)

    def cut(self, chunks):
        """White space belongs to the word before it, so parts begin where a token does: at a
        newline or, in a long line, at a word. Both are ASCII, which no character of UTF-8 hides."""
        rest, begun = b"", False
        for chunk in chunks:
            rest += chunk
            end = max(rest.rfind(b"\n"), 0) or _last_word(rest)
            # White space at the very beginning belongs to the first token.
            if end and (begun or _WORD.search(_text(rest[:end]))):
                yield rest[:end]
                rest, begun = rest[end:], True
        if rest:
            yield rest

    def _token(self, word):
        if word == "\n":
            return self.dictionary.eos()
        token = self.dictionary.index(word)
        # The name of a special symbol is a word like any other where a text holds it.
        return token if token >= self.dictionary.nspecial else self.dictionary.unk()

    def sizes(self, data):
        """White space belongs to the word before it; at the beginning, to the first word."""
        text = _text(data)
        starts = [match.start() for match in _WORD.finditer(text)]
        ends = [*starts[1:], len(text)]
        sizes = (len(text[i:j].encode()) for i, j in zip([0, *starts[1:]], ends) if starts)
        return np.fromiter(sizes, np.int64)

    def texts(self):
        table = [
            b"" if _is_filler(symbol) else f"{symbol} ".encode("utf-8", "surrogateescape")
            for symbol in self.dictionary.symbols
        ]
        table[self.dictionary.bos()] = table[self.dictionary.pad()] = b""
        table[self.dictionary.eos()] = b"\n"
        return table


class PieceCodec(Codec):
    """A token is a sequence of bytes within a word or, as ``</s>``, the newline; see
    :mod:`fairseq_sha.data.pieces`.

    Args:
        dictionary (~fairseq.data.Dictionary): the symbols of token ids
        tokenizer (str): how text is cut into pieces, the JSON of the package ``tokenizers``

    Raises:
        UserError: a symbol is no piece, or the tokenizer has other pieces
    """

    name = "pieces"
    lossless = True
    logs_words = True

    def __init__(self, dictionary, tokenizer):
        super().__init__(dictionary)
        self.tokenizer = tokenizer
        symbols = [
            symbol for symbol in dictionary.symbols[dictionary.nspecial :] if not _is_filler(symbol)
        ]
        if {*symbols, pieces.NEWLINE} != _vocabulary(tokenizer):
            raise UserError(
                f"the dictionary and the tokenizer ({pieces.FILE}) have different pieces; "
                "preprocess the corpus again with preprocess/pieces.py"
            )

    @classmethod
    def load(cls, folder):
        path = os.path.join(folder, pieces.FILE)
        dictionary = load_dictionary(cls.dictionary_type.load, os.path.join(folder, "dict.txt"))
        try:
            with open(path, encoding="utf-8") as file:
                return cls(dictionary, file.read())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; is this a folder of preprocess/pieces.py?")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a tokenizer; preprocess the corpus again")

    def state(self):
        return {**super().state(), "tokenizer": self.tokenizer}

    @classmethod
    def from_state(cls, state):
        return cls.from_symbols(state["symbols"], tokenizer=state["tokenizer"])

    def encode(self, data, offset=0):
        """Cuts of long lines are those of :func:`fairseq_sha.data.pieces.lines`, so a split of a
        data folder has the tokens that its text has here.

        Raises:
            UserError: ``tokenizers`` is not installed
        """
        tokenizer = pieces.load(self.tokenizer)
        ids = np.empty(tokenizer.get_vocab_size(), np.int64)
        for symbol, number in tokenizer.get_vocab().items():
            ids[number] = self.dictionary.index(symbol)
        ids[tokenizer.token_to_id(pieces.NEWLINE)] = self.dictionary.eos()
        parts = [ids[part] for part in pieces.encode(tokenizer, pieces.lines([data]))]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))

    def cut(self, chunks):
        lines, size = [], 0
        for line in pieces.lines(chunks):
            lines.append(line)
            size += len(line)
            if size >= PART:
                yield b"".join(lines)
                lines, size = [], 0
        if lines:
            yield b"".join(lines)

    def check(self, chunks):
        """Every text has pieces."""
        pieces.check_package()

    def sizes(self, data):
        return self.bytes_per_token()[self.encode(data).numpy()]

    def texts(self):
        nspecial = self.dictionary.nspecial
        texts = [b""] * nspecial
        texts[self.dictionary.eos()] = b"\n"
        symbols = self.dictionary.symbols[nspecial:]
        return texts + [b"" if _is_filler(s) else pieces.bytes_of(s) for s in symbols]


def _is_filler(symbol):
    """Whether a symbol only fills a vocabulary up to a multiple of eight."""
    return re.fullmatch(r"madeupword\d{4}", symbol) is not None


def _vocabulary(tokenizer):
    """The symbols of a tokenizer."""
    try:
        return set(json.loads(tokenizer)["model"]["vocab"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{pieces.FILE}: not a tokenizer; preprocess the corpus again")


def _last_word(data):
    """Where the last word begins that is behind a space, and with a character of ASCII; or 0."""
    end = len(data)
    while True:
        end = data.rfind(b" ", 0, end)
        if end < 0:
            return 0
        if 32 < data[end + 1 : end + 2].ljust(1)[0] < 127:
            return end + 1


def _text(data, offset=0):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {data[error.start]} at offset {offset + error.start} of the text is not "
            "UTF-8, as words must be; convert the text"
        )


#: By name.
CODECS = {codec.name: codec for codec in (ByteCodec, WordCodec, PieceCodec)}


def codec_from_state(state):
    """The codec of a checkpoint, from its :meth:`Codec.state`. Old checkpoints, which do not name
    their codec, are of bytes.

    Raises:
        UserError: this version has no such codec; as :meth:`Codec.from_state`
    """
    name = state.get("codec") or "bytes"
    if name not in CODECS:
        raise UserError(f"its codec {name!r} is unknown; update fairseq_sha")
    return CODECS[name].from_state(state)
