"""Turn a file into a data-bin folder of pieces that fairseq reads.

The folder is as that of :mod:`~fairseq_sha.data.data_bin`, with a token per piece in place of a
byte, and the tokenizer as ``pieces.json`` beside ``dict.txt``. It is the same whenever it is made
from the same file. Memory does not grow with the file, except for the distinct words of train.
"""

import numpy as np

from fairseq_sha.data import data_bin, pieces


def convert(stream, name, dest, valid, test, vocabulary):
    """Write the data-bin folder ``dest`` and print a summary.

    stream, name, dest, valid, test: as for ``data_bin.convert``
    vocabulary: number of pieces

    UserError: a split is smaller than 2 bytes, train gives fewer pieces, or reading or writing
    fails.
    """
    splits = data_bin.cut(stream, name, valid, test)
    with data_bin.new_folder(dest) as folder:
        tokenizer = pieces.train(_lines(splits[0]), vocabulary)
        counts = [write_pieces(tokenizer, split, folder) for split in splits]
        symbols = data_bin.padded(sorted_symbols(tokenizer, counts[0]))
        table = token_of_piece(tokenizer, symbols)
        newline = tokenizer.token_to_id(pieces.NEWLINE)
        items = [split.lines(count[newline]) for split, count in zip(splits, counts)]
        for split, lines in zip(splits, items):
            data_bin.finish_split(folder, split.name, lines, table, np.uint16)
        tokenizer.save(str(folder / pieces.FILE), pretty=False)
        data_bin.write_dictionary(symbols, folder / "dict.txt")

    for split, count, lines in zip(splits, counts, items):
        print(f"{split.name}: {split.size:,} bytes, {count.sum():,} pieces, {lines:,} lines")
    print(f"dictionary: {data_bin.SPECIALS + len(symbols)} symbols, {vocabulary} of them pieces")
    print(f"data-bin folder: {dest}")


def _lines(split):
    return pieces.lines(chunk.tobytes() for chunk in split.chunks())


def write_pieces(tokenizer, split, folder):
    """Write the split's .bin with the tokenizer's ids; returns how often each occurs, int64 [V]."""
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    with open(folder / f"{split.name}.bin", "wb") as file:
        for ids in pieces.encode(tokenizer, _lines(split)):
            file.write(ids.astype(np.uint16))
            counts += np.bincount(ids, minlength=len(counts))
    return counts


def sorted_symbols(tokenizer, counts):
    """(symbol, count) of each piece except newline, in the order of fairseq's Dictionary.finalize:
    falling count, ties in the order of the strings."""
    symbols = [
        (symbol, int(counts[number]))
        for symbol, number in tokenizer.get_vocab().items()
        if symbol != pieces.NEWLINE
    ]
    return sorted(symbols, key=lambda symbol: (-symbol[1], symbol[0]))


def token_of_piece(tokenizer, symbols):
    """The token of each of the tokenizer's ids, uint16 [V]."""
    table = np.empty(tokenizer.get_vocab_size(), np.uint16)
    table[tokenizer.token_to_id(pieces.NEWLINE)] = data_bin.EOS
    for token, (symbol, _) in enumerate(symbols, start=data_bin.SPECIALS):
        number = tokenizer.token_to_id(symbol)
        if number is not None:  # not one that pads the dictionary
            table[number] = token
    return table
