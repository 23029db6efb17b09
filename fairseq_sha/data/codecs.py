"""What a token is worth: stub, to be replaced at the merge."""

import os

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.errors import UserError


class Codec:
    counts_words = False

    def __init__(self, dictionary):
        self.dictionary = dictionary
        self.start = dictionary.eos()

    @classmethod
    def load(cls, folder):
        return cls(cls.dictionary_type.load(os.path.join(folder, "dict.txt")))

    @classmethod
    def from_symbols(cls, symbols):
        dictionary = cls.dictionary_type()
        for symbol in symbols[dictionary.nspecial :]:
            dictionary.add_symbol(symbol)
        return cls(dictionary)

    def is_word(self):
        return None

    def not_generated(self):
        symbols = self.dictionary.symbols
        return [i for i, symbol in enumerate(symbols) if symbol.startswith("madeupword")]


class ByteCodec(Codec):
    name = "bytes"
    lossless = True
    dictionary_type = ByteDictionary

    def encode(self, data):
        return self.dictionary.encode(data)

    def decode(self, tokens):
        return self.dictionary.decode(tokens)

    def bytes_per_token(self):
        return np.array([int(v is not None) for v in self.dictionary.bytes_by_id()])

    def is_forbidden(self, tokens):
        wrong = (tokens >= len(self.dictionary)) | (tokens < self.dictionary.eos())
        return wrong | (tokens == self.dictionary.unk())

    def not_generated(self):
        return [self.dictionary.unk(), *super().not_generated()]


class WordCodec(Codec):
    name = "words"
    lossless = False
    dictionary_type = Dictionary
    counts_words = True

    @classmethod
    def load(cls, folder):
        if not os.path.isfile(os.path.join(folder, "dict.txt")):
            raise UserError(f"{folder}/dict.txt: no such file")
        return super().load(folder)

    def encode(self, data):
        return torch.tensor([self.dictionary.index(w) for w in data.decode().split()])

    def decode(self, tokens):
        return " ".join(self.dictionary[int(token)] for token in tokens).encode()

    def bytes_per_token(self):
        sizes = [len(symbol.encode()) + 1 for symbol in self.dictionary.symbols]
        sizes[: self.dictionary.nspecial] = [0, 0, 1, len("<unk>") + 1]
        return np.array(sizes)

    def is_forbidden(self, tokens):
        return (tokens >= len(self.dictionary)) | (tokens < self.dictionary.eos())

    def is_word(self):
        return self.bytes_per_token() > 0


CODECS = {"bytes": ByteCodec, "words": WordCodec}
