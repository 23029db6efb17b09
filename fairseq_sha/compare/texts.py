"""The text of a split of a data folder, read without torch and fairseq."""

import struct
from pathlib import Path

import numpy as np

from fairseq_sha.data import pieces
from fairseq_sha.data.data_bin import (
    DTYPE_CODES,
    EOS,
    INDEX_MAGIC,
    INDEX_VERSION,
    SPECIALS,
)
from fairseq_sha.errors import UserError

CHUNK = 1 << 20  # tokens at a time
HEADER = struct.Struct("<QBQ")  # after the magic: version, code of the dtype, number of items


def read_text(folder, split):
    """The bytes that the tokens of a split stand for.

    Args:
        folder (str or Path): a data folder of bytes or of pieces
        split (str): train, valid or test

    Raises:
        UserError: a file is missing or damaged; tokens are words, whose bytes are not all known
    """
    folder = Path(folder)
    texts = _texts(folder)
    tokens = _tokens(folder / split)
    out = []
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK].tolist()
        try:
            out.append(b"".join([texts[token] for token in part]))
        except KeyError as error:
            raise UserError(
                f"{folder / split}.bin: token {error} stands for no text; preprocess it again"
            )
    return b"".join(out)


def _texts(folder):
    """The text that each token stands for: a dict."""
    path = folder / "dict.txt"
    are_pieces = (folder / pieces.FILE).is_file()
    texts = {EOS: b"\n"}
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            symbols = [line.rstrip("\n").rsplit(" ", 1)[0] for line in file]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make a data folder with a script in preprocess/")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; preprocess the corpus again")
    for token, symbol in enumerate(symbols, start=SPECIALS):
        if symbol.startswith("madeupword"):
            continue
        if are_pieces:
            text = pieces.bytes_of(symbol)
        else:
            is_byte = symbol.isdigit() and symbol.isascii() and int(symbol) < 256
            text = bytes([int(symbol)]) if is_byte else None
        if text is None:
            raise UserError(
                f"{path}: {symbol!r} is not a byte, and the bytes of a text of words cannot be "
                "restored; name a folder of bytes or pieces of the same text"
            )
        texts[token] = text
    return texts


def _tokens(prefix):
    """The token ids of a split, memory-mapped."""
    index, path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, path):
        if not file.is_file():
            raise UserError(f"{file}: no such file; preprocess the corpus, or name its folder")
    content = index.read_bytes()
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    start = len(INDEX_MAGIC) + HEADER.size
    try:
        version, code, items = HEADER.unpack_from(content, len(INDEX_MAGIC))
        dtype = dtypes[code]
        sizes = np.frombuffer(content, np.int32, items, start)
        if not content.startswith(INDEX_MAGIC) or version != INDEX_VERSION:
            raise ValueError
    except (struct.error, KeyError, ValueError):
        raise UserError(
            f"{index}: not an index in fairseq's mmap format; preprocess the corpus again"
        )
    tokens = int(sizes.sum(dtype=np.int64))
    if path.stat().st_size != tokens * dtype.itemsize:
        raise UserError(
            f"{path}: its size differs from what {index} says; preprocess the corpus again"
        )
    if not tokens:
        raise UserError(f"{path}: no tokens; preprocess the corpus again")
    return np.memmap(path, dtype, "r")
