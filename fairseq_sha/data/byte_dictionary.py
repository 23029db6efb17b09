"""The dictionary of byte-level models: symbols are decimal byte values, newline is ``</s>``."""

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_sha.errors import UserError

NEWLINE = 10


class ByteDictionary(Dictionary):
    """Maps bytes to token ids and back.

    Symbols are the decimal values of the bytes that occur ("60", "109", ...); byte 10 (newline) is
    ``</s>``, so that each line of a file is one item of the data folder. This is what
    ``fairseq-preprocess`` makes of the customary text form of enwik8. ``<s>``, ``<pad>``, ``<unk>``
    and the ``madeupword`` symbols, which fill the vocabulary up to a multiple of eight, stand for
    no byte.
    """

    @classmethod
    def load(cls, f, **options):
        """Load ``dict.txt`` and check that it lists byte values.

        Raises:
            UserError: the file is missing, malformed, or holds a symbol that is no byte value
        """
        dictionary = load_dictionary(super().load, f, **options)
        for symbol in _words(dictionary):
            if _byte_of(symbol) is None:
                raise UserError(
                    f"{f}: {symbol!r} is not a byte value; this task reads byte-level data, "
                    "such as the scripts in preprocess/ make"
                )
        return dictionary

    def bytes_by_id(self):
        """The byte that each token id stands for, or None: a list of ``len(self)``."""
        values = [_byte_of(symbol) for symbol in self.symbols]
        values[self.eos()] = NEWLINE
        return values

    def encode(self, data, offset=0):
        """Token ids of a bytes object: LongTensor ``[len(data)]``.

        Args:
            data (bytes): a text or a part of it
            offset (int): of the part, for messages

        Raises:
            UserError: a byte that the dictionary lacks; it has no honest probability.
        """
        ids = np.full(256, -1, dtype=np.int64)
        for i, value in enumerate(self.bytes_by_id()):
            if value is not None:
                ids[value] = i
        tokens = ids[np.frombuffer(data, dtype=np.uint8)]
        unseen = np.flatnonzero(tokens < 0)
        if len(unseen):
            first = int(unseen[0])
            raise UserError(
                f"byte {data[first]} at offset {offset + first} of the text does not occur in the "
                "training data, so the model has no probability for it; remove it or train on "
                "data preprocessed with --all-bytes"
            )
        return torch.from_numpy(tokens)

    def decode(self, tokens):
        """Bytes of a sequence of token ids. Ids that stand for no byte are left out."""
        values = np.array([-1 if value is None else value for value in self.bytes_by_id()])
        if isinstance(tokens, torch.Tensor):  # generation leaves them on its device
            tokens = tokens.cpu().numpy()
        decoded = values[np.asarray(tokens, np.int64)]
        return decoded[decoded >= 0].astype(np.uint8).tobytes()

    def encode_line(self, line, *_, **__):
        """Token ids of a text in UTF-8. Unlike fairseq's, it appends no ``</s>``: that would be
        one more newline."""
        return self.encode(line.encode("utf-8", "surrogateescape")).int()

    def string(self, tensor, *_, **__):
        """Text of a sequence of token ids, newlines included; invalid UTF-8 becomes U+FFFD."""
        return self.decode(tensor).decode("utf-8", "replace")


def load_dictionary(load, path, **options):
    """Load ``dict.txt`` by ``load``, a ``load`` of fairseq's dictionaries.

    Raises:
        UserError: the file is missing or malformed
    """
    try:
        return load(path, **options)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a folder made by a script in preprocess/?")
    except Exception as error:
        # What fairseq raises for malformed files, one of them a bare Exception.
        if type(error) not in (Exception, RuntimeError, ValueError):
            raise
        first_line = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{path}: not a dictionary ({first_line}); preprocess the corpus again")


def is_of_bytes(dictionary):
    """Whether a dictionary lists byte values only, and some."""
    words = _words(dictionary)
    return bool(words) and all(_byte_of(symbol) is not None for symbol in words)


def _words(dictionary):
    """The symbols that occur in a text."""
    symbols = dictionary.symbols[dictionary.nspecial :]
    return [symbol for symbol in symbols if not symbol.startswith("madeupword")]


def _byte_of(symbol):
    if symbol.isascii() and symbol.isdigit() and str(int(symbol)) == symbol and int(symbol) < 256:
        return int(symbol)
    return None
