"""Turn text that is split into words into a data-bin folder that fairseq reads.

The folder holds ``dict.txt`` and, for each split, ``.bin`` (the tokens: uint16, or uint32 for a
dictionary of 65,500 symbols or more) and ``.idx`` (where each item lies). An item is a line. Its
words are separated by any white space of Unicode, and ``</s>`` ends it, also where it is blank and
where the last line has no newline. ``<unk>`` in the text is fairseq's special symbol.

With ``order="fairseq"`` the files are those of ``fairseq-preprocess --only-source``, byte for byte.
What the two would read differently is an error here: a carriage return that is not followed by a
newline, which ends a line for fairseq, and the words ``<s>``, ``<pad>`` and ``</s>``.

Each word is split off and looked up once: the words of train get numbers in the order in which they
appear, and become tokens when their counts are known. Memory holds the vocabulary and one block of
text, whatever the size of the text. Like :mod:`~fairseq_sha.data.data_bin`, this module needs
nothing but numpy.
"""

import itertools
import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from fairseq_sha.data import data_bin
from fairseq_sha.data.data_bin import EOS, SPECIALS, UNK
from fairseq_sha.errors import UserError

ORDERS = ("reference", "fairseq")
BLOCK = 1 << 20  # bytes of text at a time
NUMBERS = np.int32  # how words are stored until their tokens are known
RESERVED = ("<s>", "<pad>", "</s>")  # symbols of fairseq that no text may hold
EOS_WORD, UNK_WORD = "</s>", "<unk>"
UINT16_BELOW = 65_500  # fairseq's best_fitting_int_dtype


class Counts(NamedTuple):
    """What a split holds."""

    lines: int
    words: int  # without the ends of lines
    unknown: int  # words that are <unk>

    @property
    def tokens(self):
        """Words and ends of lines."""
        return self.words + self.lines


class Summary(NamedTuple):
    """What was converted."""

    splits: dict  # of str to Counts
    types: int  # different words in train; <unk> is one if it occurs, </s> is not
    symbols: int  # size of the dictionary, with special and padding symbols


def convert(
    files,
    dest,
    order="reference",
    min_count=1,
    max_size=None,
    vocabulary=None,
    unknown="learned",
    check=None,
):
    """Write the data-bin folder ``dest`` and print a summary.

    Args:
        files (dict): what each split is read from, ``train`` and any others: a path, a binary
            stream, or an iterable of bytes, whose items may end anywhere
        dest (str or Path): a folder that is empty or does not exist. It appears (or is filled) when
            everything is converted, or stays as it is.
        order (str): of the words in the dictionary. ``reference``: falling count, ties in order of
            first appearance, as in the published code of Transformer-XL and SRU++. ``fairseq``:
            falling count, ties in alphabetical order, and padded to a multiple of 8.
        min_count (int): words that occur less often in train are ``<unk>``
        max_size (int): at most so many symbols, with the four special ones, but without padding
            (``--nwordssrc`` of fairseq-preprocess). None: no limit
        vocabulary (iterable of str): the words of the dictionary in their order, instead of the
            words of train; excludes ``order``, ``min_count`` and ``max_size``
        unknown (str): which words of the other splits may be missing in the dictionary and become
            ``<unk>``. ``never``: none. ``learned``: any, if train has ``<unk>`` too. ``always``:
            any, as in fairseq-preprocess.
        check (callable): is called with the :class:`Summary` before ``dest`` appears, and may raise

    Returns:
        Summary

    Raises:
        UserError: a split is too small, is not UTF-8 or holds what it must not, or reading or
            writing fails
    """
    if order not in ORDERS or unknown not in ("never", "learned", "always"):
        raise ValueError(f"order {order!r}, unknown {unknown!r}")
    dest = data_bin.checked_dest(dest)
    sources = {name: Source(name, files[name]) for name in sorted(files, key="train".__ne__)}
    with data_bin.new_folder(dest) as folder:
        numbers, lines = number_words(sources["train"], folder / "train.bin")
        counts = count_numbers(folder / "train.bin", len(numbers))
        types = len(numbers) - 2 + int(counts[1] > 0)
        if vocabulary is None:
            symbols, times = chosen(numbers, counts, order, min_count, max_size)
        else:
            symbols = list(dict.fromkeys(vocabulary))
            special = {*RESERVED, UNK_WORD}.intersection(symbols)
            if special:
                raise UserError(
                    f"the vocabulary has {min(special)}, which is a special symbol of fairseq; "
                    "remove it"
                )
            times = [int(counts[numbers[s]]) if s in numbers else 0 for s in symbols]
        index = dict(zip(symbols, itertools.count(SPECIALS)))
        if vocabulary is None and order == "fairseq":
            pad(index, times)
        with open(folder / "dict.txt", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(map("{} {}\n".format, index, times))

        size = SPECIALS + len(index)
        dtype = np.dtype(np.uint16 if size < UINT16_BELOW else np.uint32)
        table = np.fromiter(map(index.get, numbers, itertools.repeat(UNK)), np.int32, len(numbers))
        table[0] = EOS
        del numbers, symbols, times
        splits = {"train": finish(folder, "train", lines, counts[table == UNK].sum(), dtype, table)}
        allowed = unknown == "always" or (unknown == "learned" and splits["train"].unknown > 0)
        remedy = (
            f"have rare words become {UNK_WORD} with a minimum count of 2 or more"
            if unknown == "learned"
            else "use the train split that belongs to it"
        )
        index[EOS_WORD] = EOS
        for name, source in sources.items():
            if name != "train":
                found = look_up_words(source, folder / f"{name}.bin", index, allowed, remedy)
                splits[name] = finish(folder, name, *found, dtype)
        summary = Summary(splits, types, size)
        if check is not None:
            check(summary)

    for name, split in splits.items():
        print(
            f"{name}: {split.lines:,} lines, {split.words:,} words ({split.unknown:,} of them "
            f"{UNK_WORD}), {split.tokens:,} tokens with ends of lines"
        )
    print(f"dictionary: {size:,} symbols; train has {types:,} different words")
    print(f"data-bin folder: {dest}")
    return summary


def add_order(parser):
    """Add the option ``--order`` of :func:`convert` to an argparse parser."""
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default=ORDERS[0],
        help="of the words in the dictionary, most frequent first: ties in order of first "
        "appearance, as in the published code of Transformer-XL and SRU++ (reference, the "
        "default), or in alphabetical order and padded, as fairseq-preprocess does (fairseq)",
    )


class Source:
    """The text of a split, block by block.

    Args:
        split (str): the name of the split
        file (str, Path, binary stream or iterable of bytes): see :func:`convert`
    """

    def __init__(self, split, file):
        self.split, self.file = split, file
        is_path = isinstance(file, (str, os.PathLike))
        #: What messages call the text.
        self.name = str(file) if is_path else str(getattr(file, "name", split))

    def blocks(self):
        """Yield pairs of a list of words and a :class:`Block`; ``</s>`` stands for each end of a
        line."""
        position = 1
        for data in self._whole_words():
            block = Block(self.name, data, position)
            words = block.text.replace("\n", f" {EOS_WORD} ").split()
            position += block.lines
            yield words, block

    def _pieces(self):
        if isinstance(self.file, (str, os.PathLike)):
            with data_bin.open_input(self.file) as stream:
                yield from read(stream, self.name)
        elif hasattr(self.file, "read"):
            yield from read(self.file, self.name)
        else:
            yield from self.file

    def _whole_words(self):
        """The text in pieces that end after a newline or a space; the last one after a newline."""
        parts, last = [], b"\n"
        for data in self._pieces():
            end = max(data.rfind(b"\n"), data.rfind(b" ")) + 1
            if end:
                yield b"".join([*parts, data[:end]])
                parts = []
            parts.append(data[end:])
            last = data[-1:] or last
        if last != b"\n":
            parts.append(b"\n")
        rest = b"".join(parts)
        if rest:
            yield rest


def read(stream, name):
    """Yield the content of a binary stream."""
    while True:
        with data_bin.explained(f"cannot read {name}", "run again"):
            data = stream.read(BLOCK)
        if not data:
            return
        yield data


class Block:
    """A decoded piece of a text.

    Args:
        name (str): what messages call the text
        data (bytes): ends after a word
        position (int): the number of its first line

    Raises:
        UserError: it is not UTF-8, or a carriage return stands alone in it
    """

    def __init__(self, name, data, position):
        self.name, self.position = name, position
        try:
            self.text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = position + data.count(b"\n", 0, error.start)
            raise UserError(
                f"line {line:,} of {name} is not UTF-8 (byte {data[error.start]}); convert "
                "it, for example with iconv"
            ) from None
        self.lines = self.text.count("\n")
        if "\r" in self.text and self.text.count("\r") != self.text.count("\r\n"):
            alone = next(
                i for i, c in enumerate(self.text) if c == "\r" and self.text[i + 1 : i + 2] != "\n"
            )
            raise self.error(
                self.text.count("\n", 0, alone),
                "has a carriage return that does not end it, which fairseq would read as another "
                "end of a line; replace it by a newline or a space",
            )

    def error(self, lines, problem):
        """A UserError about the line that comes ``lines`` after the first one of the block."""
        return UserError(f"line {self.position + lines:,} of {self.name} {problem}")

    def reserved(self):
        """The error for a word that no text may hold, where the block has one; None if not."""
        for number, line in enumerate(self.text.split("\n")):
            for word in line.split():
                if word in RESERVED:
                    return self.error(
                        number,
                        f"has the word {word}, which is a special symbol of fairseq; remove or "
                        "rename it",
                    )
        return None


class _Numbers(defaultdict):
    """Numbers words in the order in which they are looked up; ``</s>`` is 0 and ``<unk>`` 1."""

    def __init__(self):
        super().__init__(itertools.count().__next__)
        self[EOS_WORD], self[UNK_WORD]


def number_words(source, path):
    """Write the number of each word of a split to ``path``, int32.

    Returns:
        dict of str to int, and the number of lines
    """
    numbers, lines = _Numbers(), 0
    with open(path, "wb") as file:
        for words, block in source.blocks():
            ids = np.fromiter(map(numbers.__getitem__, words), NUMBERS, len(words))
            # In the text itself "</s>" would count as an end of a line.
            ends = np.count_nonzero(ids == 0)
            if ends != block.lines or "<s>" in numbers or "<pad>" in numbers:
                raise block.reserved()
            file.write(ids)
            lines += block.lines
    check_size(source, path)
    return numbers, lines


def look_up_words(source, path, index, allowed, remedy):
    """Write the token of each word of a split to ``path``, int32.

    Args:
        index (dict of str to int): the tokens of the dictionary
        allowed (bool): whether a word may be missing there
        remedy (str): for messages: what to do if one is and may not

    Returns:
        the number of lines, and that of words that are ``<unk>``
    """
    lines = unknown_words = 0
    with open(path, "wb") as file:
        for words, block in source.blocks():
            tokens = np.fromiter(map(index.get, words, itertools.repeat(UNK)), NUMBERS, len(words))
            ends = np.count_nonzero(tokens == EOS)
            places = np.flatnonzero(tokens == UNK)
            unknown_words += len(places)
            unknown = {words[i] for i in places} - {UNK_WORD}
            if ends != block.lines or unknown.intersection(RESERVED):
                raise block.reserved()
            if unknown and not allowed:
                first = next(i for i, word in enumerate(words) if word in unknown)
                raise block.error(
                    words[:first].count(EOS_WORD),
                    f"has the word {words[first]!r}, which the vocabulary of train lacks; {remedy}",
                )
            file.write(tokens)
            lines += block.lines
    check_size(source, path)
    return lines, unknown_words


def check_size(source, path):
    """UserError if a split has too few tokens to predict one from another."""
    tokens = os.path.getsize(path) // np.dtype(NUMBERS).itemsize
    if tokens < data_bin.MINIMUM:
        found = "is empty" if tokens == 0 else "is one blank line"
        raise UserError(f"{source.name} {found}; give a file with some words in it")


def count_numbers(path, size):
    """How often each number below ``size`` occurs in a file of int32: int64 ``[size]``."""
    counts = np.zeros(size, np.int64)
    with open(path, "rb") as file:
        for numbers in data_bin.arrays(file, NUMBERS):
            counts += np.bincount(numbers, minlength=size)
    return counts


def chosen(numbers, counts, order, min_count, max_size):
    """The words of a dictionary in its order, without special symbols, and their counts: two lists.

    Args:
        numbers (dict of str to int): the number of each word, in order of first appearance
        counts (ndarray): how often each number occurs
        order, min_count, max_size: see :func:`convert`
    """
    words = list(numbers)
    ids = np.arange(2, len(words))
    if order == "fairseq":
        ids = np.fromiter(map(numbers.__getitem__, sorted(words[2:])), np.int64, len(ids))
    ids = ids[np.argsort(-counts[ids], kind="stable")]
    ids = ids[: None if max_size is None else max(0, max_size - SPECIALS)]
    ids = ids[counts[ids] >= min_count]
    return [words[i] for i in ids.tolist()], counts[ids].tolist()


def pad(index, counts):
    """Add unused words to a dictionary until its size is a multiple of 8, as fairseq does.

    Args:
        index (dict of str to int): the token of each word
        counts (list of int): how often each occurs
    """
    for i in itertools.count():
        if (SPECIALS + len(index)) % data_bin.MULTIPLE == 0:
            return
        word = f"madeupword{i:04d}"
        if word not in index:  # a text may hold it
            index[word] = SPECIALS + len(index)
            counts.append(0)


def finish(folder, name, lines, unknown, dtype, table=None):
    """:func:`~fairseq_sha.data.data_bin.finish_split` for a split whose lines and ``<unk>`` are
    counted; returns its :class:`Counts`."""
    tokens = data_bin.finish_split(folder, name, lines, table, NUMBERS, dtype)
    return Counts(lines, tokens - lines, int(unknown))
