"""Codecs: what the tokens of a dictionary are worth as text.

Whatever turns text into tokens, tokens into text, or a cost per token into a cost per byte asks the
codec. A checkpoint names its codec and lists its symbols, so that it needs no other file.
"""

import abc
import os
import re

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_sha.data.byte_dictionary import ByteDictionary, load_dictionary
from fairseq_sha.errors import UserError


class Codec(abc.ABC):
    """What a token is worth. ``V`` is the size of the vocabulary.

    Args:
        dictionary (~fairseq.data.Dictionary): the symbols of token ids
    """

    #: The name under which checkpoints and ``--codec`` know it.
    name = None
    #: Whether ``decode(encode(text))`` is ``text`` for every text that can be encoded.
    lossless = False
    #: Whether :meth:`is_word` says which tokens are words.
    counts_words = False
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

    @classmethod
    def from_symbols(cls, symbols):
        """The codec of a checkpoint, from the list of all symbols, special ones included.

        Raises:
            UserError: no dictionary of fairseq has these symbols in this order
        """
        dictionary = cls.dictionary_type()
        for symbol in symbols[dictionary.nspecial :]:
            dictionary.add_symbol(symbol)
        if dictionary.symbols != list(symbols):
            raise UserError("the checkpoint's symbols are not a dictionary's; name another one")
        return cls(dictionary)

    @abc.abstractmethod
    def encode(self, data):
        """Token ids of a text: bytes to LongTensor ``[length]``.

        Raises:
            UserError: something in it cannot be encoded
        """

    @abc.abstractmethod
    def decode(self, tokens):
        """The text that a sequence of token ids stands for, as bytes."""

    @abc.abstractmethod
    def bytes_per_token(self):
        """How many bytes of text each token stands for: int64 array ``[V]``."""

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

    def is_word(self):
        """Which tokens are words, for perplexity per word: bool array ``[V]``; None if the codec
        does not know."""
        return None

    def is_forbidden(self, tokens):
        """Which token ids of an array no corpus may hold: those that the dictionary lacks, ``<s>``
        and ``<pad>``."""
        return (tokens >= len(self.dictionary)) | (tokens < self.dictionary.eos())

    def not_generated(self):
        """Token ids that generation must never choose, besides ``<s>`` and ``<pad>``: a list."""
        symbols = enumerate(self.dictionary.symbols)
        return [i for i, symbol in symbols if symbol.startswith("madeupword")]


class ByteCodec(Codec):
    """A token is a byte, see :class:`~fairseq_sha.data.byte_dictionary.ByteDictionary`."""

    name = "bytes"
    lossless = True
    dictionary_type = ByteDictionary

    def encode(self, data):
        return self.dictionary.encode(data)

    def sizes(self, data):
        return np.ones(len(data), np.int64)

    def decode(self, tokens):
        return self.dictionary.decode(tokens)

    def bytes_per_token(self):
        return np.array([value is not None for value in self.dictionary.bytes_by_id()], np.int64)

    def is_forbidden(self, tokens):
        # An unknown byte would be scored as if one symbol stood for all unknown bytes.
        return super().is_forbidden(tokens) | (tokens == self.dictionary.unk())

    def not_generated(self):
        return [self.dictionary.unk(), *super().not_generated()]


# A word, or the end of a line.
_WORD = re.compile(r"\S+|\n")


class WordCodec(Codec):
    """A token is a word or, as ``</s>``, the end of a line: text as ``fairseq-preprocess`` splits
    it. Words that the dictionary lacks are ``<unk>``, an ordinary token.

    A word stands for its UTF-8 bytes and the space after it, and ``</s>`` for the newline. That is
    how the files of WikiText are written. How white space was spread in any other text is lost.
    """

    name = "words"
    counts_words = True

    def encode(self, data):
        tokens = [self._token(match[0]) for match in _WORD.finditer(_text(data))]
        return torch.tensor(tokens, dtype=torch.long)

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

    def decode(self, tokens):
        table = self._table()
        return b"".join(table[int(token)] for token in tokens)

    def bytes_per_token(self):
        return np.array([len(text) for text in self._table()], np.int64)

    def is_word(self):
        return self.bytes_per_token() > 0

    def _table(self):
        """The text of each token: a list of bytes ``[V]``."""
        table = [
            f"{symbol} ".encode("utf-8", "surrogateescape") for symbol in self.dictionary.symbols
        ]
        table[self.dictionary.eos()] = b"\n"
        for i in (self.dictionary.bos(), self.dictionary.pad(), *self.not_generated()):
            table[i] = b""
        return table


def _text(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {data[error.start]} at offset {error.start} of the text is not UTF-8, as words "
            "must be; convert the text"
        )


#: By name.
CODECS = {codec.name: codec for codec in (ByteCodec, WordCodec)}
