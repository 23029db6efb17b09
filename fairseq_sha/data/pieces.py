"""Pieces: byte-level byte-pair encoding, in which every sequence of bytes has tokens.

The 256 bytes are pieces, so nothing is unknown, and tokens always give back exactly the bytes that
they were made from, whether these are UTF-8 or not. Training merges the most frequent pairs of
neighbours (R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units")
inside words, which are split as in GPT-2: one space at most, then letters, or digits, or other
signs. A newline is always a piece of its own.

The symbol of a piece is its bytes in GPT-2's printable alphabet, so the symbol alone says which
bytes it stands for. Cutting text into pieces needs more, the order of the merges. That is the
tokenizer, in the JSON of Hugging Face's package ``tokenizers``, which does this work. This module
needs neither torch nor fairseq.
"""

import re

import numpy as np

from fairseq_sha.errors import UserError

#: Beside ``dict.txt`` in a data folder: the tokenizer.
FILE = "pieces.json"
#: A longer line is cut every so many bytes, and no piece crosses the cut. This bounds the memory.
LONGEST_LINE = 1 << 20
BATCH = 1 << 20  # bytes that are given to the tokenizer at once
MINIMUM, MAXIMUM = 256, 65_000  # pieces: the bytes, and what fits into uint16
#: A pair that occurs less often is not merged.
MINIMUM_COUNT = 2


def _alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable}
    shown.update((byte, chr(256 + place)) for place, byte in enumerate(others))
    return shown


#: The character that shows each byte: GPT-2's alphabet, without white space or control characters.
CHARACTERS = _alphabet()
BYTES = {character: byte for byte, character in CHARACTERS.items()}
#: The symbol of the newline in the tokenizer; in a dictionary it is ``</s>``.
NEWLINE = CHARACTERS[10]


def symbol_of(text):
    """The symbol of a piece that stands for these bytes."""
    return "".join(CHARACTERS[byte] for byte in text)


def bytes_of(symbol):
    """The bytes that a symbol stands for, or None if it is no piece."""
    values = [BYTES.get(character) for character in symbol]
    return None if None in values else bytes(values)


def lines(chunks):
    """The lines of a text, with their newlines; long ones in parts of ``LONGEST_LINE`` bytes. The
    lines do not depend on where the chunks begin.

    Args:
        chunks (iterable of bytes): the text
    """
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + bytes(chunk)).split(b"\n")
        for line in whole:
            last = len(line) - len(line) % LONGEST_LINE
            yield from _parts(line[:last])
            yield line[last:] + b"\n"
        last = len(rest) - len(rest) % LONGEST_LINE
        yield from _parts(rest[:last])
        rest = rest[last:]
    if rest:
        yield rest


def _parts(text):
    return (text[i : i + LONGEST_LINE] for i in range(0, len(text), LONGEST_LINE))


def load(text):
    """The tokenizer of its JSON.

    Raises:
        UserError: it is not one; ``tokenizers`` is not installed
    """
    try:
        return _package().Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:
        if type(error) is not Exception:  # what the package raises for malformed JSON
            raise
        raise UserError(f"{FILE}: not a tokenizer ({error}); preprocess the corpus again")


def train(texts, vocabulary):
    """A tokenizer trained on a text. The same text gives the same tokenizer.

    Args:
        texts (iterable of bytes): as from :func:`lines`
        vocabulary (int): number of pieces, the 256 bytes included

    Raises:
        UserError: not so many pairs occur more than once
    """
    package = _package()
    pre = package.pre_tokenizers
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split("\n", "isolated"), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=MINIMUM_COUNT,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    runs = (run for text in texts for run in _runs(text) if isinstance(run, str))
    tokenizer.train_from_iterator(runs, trainer)
    size = tokenizer.get_vocab_size()
    if size < vocabulary:
        raise UserError(
            f"train gives {size:,} pieces, not {vocabulary:,}: no other pair occurs more than "
            f"once in it; use --vocabulary {size} or less, or more text"
        )
    return tokenizer


def encode(tokenizer, texts):
    """Cut a text into pieces.

    Args:
        tokenizer: from :func:`load` or :func:`train`
        texts (iterable of bytes): as from :func:`lines`

    Yields:
        the tokenizer's ids of the pieces: int64 arrays, one for about a megabyte
    """
    byte_ids = [tokenizer.token_to_id(CHARACTERS[byte]) for byte in range(256)]
    runs, size = [], 0

    def flush():
        strings = [run for run in runs if isinstance(run, str)]
        encoded = iter(tokenizer.encode_batch_fast(strings, add_special_tokens=False))
        ids = []
        for run in runs:
            if isinstance(run, str):
                ids.extend(next(encoded).ids)
            else:
                ids.append(byte_ids[run])
        return np.array(ids, np.int64)

    for text in texts:
        runs.extend(_runs(text))
        size += len(text)
        if size >= BATCH:
            yield flush()
            runs, size = [], 0
    if runs:
        yield flush()


# A byte that is not UTF-8, as Python's surrogateescape shows it, or the end of a line.
_SINGLE = re.compile("[\udc80-\udcff\n]")


def _runs(text):
    """What a line consists of: strings, which the tokenizer cuts, and between them as int the bytes
    that are not UTF-8, and the newline."""
    text = text.decode("utf-8", "surrogateescape")
    begin = 0
    for match in _SINGLE.finditer(text):
        if begin < match.start():
            yield text[begin : match.start()]
        yield ord(match[0]) & 0xFF
        begin = match.end()
    if begin < len(text):
        yield text[begin:]


def check_package():
    """Raise a UserError if ``tokenizers`` is not installed."""
    _package()


def _package():
    try:
        import tokenizers
    except ImportError:
        raise UserError("tokenizers is missing; pip install 'fairseq-sha[pieces]'")
    return tokenizers
