"""Texts that are read in parts, and what is counted in each part."""

import contextlib
import shutil
import stat
import sys
import tempfile

import numpy as np

from fairseq_sha.data.codecs import PART
from fairseq_sha.data.pieces import LONGEST_LINE
from fairseq_sha.data.pieces import lines as split_lines

BLOCK = 10_000  # bytes of text behind each entry of Blocks


class Text:
    """A text in a file.

    Args:
        file (file object): seekable, binary
        name (str): for people
    """

    def __init__(self, file, name):
        self.name = name
        self.size = file.seek(0, 2)
        self._file = file

    def chunks(self):
        """The text from its beginning, in bytes objects of at most ``PART`` bytes. Several may be
        read at the same time."""
        for start in range(0, self.size, PART):
            self._file.seek(start)
            yield self._file.read(PART)


@contextlib.contextmanager
def opened(path):
    """The :class:`Text` of a path; ``-`` is standard input. What is no regular file is copied to a
    temporary file, because a text may be read more than once.

    Raises:
        OSError: the file cannot be read
    """
    if str(path) == "-":
        name, source = "standard input", contextlib.nullcontext(sys.stdin.buffer)
    else:
        name, source = str(path), open(path, "rb")
    with source as file, contextlib.ExitStack() as stack:
        if str(path) == "-" or not stat.S_ISREG(path.stat().st_mode):
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            file = copy
        yield Text(file, name)


def side_by_side(first, second):
    """Two readings of one text, which may be cut differently, as one.

    Args:
        first, second (iterable): pairs of text and an array ``[len(text)]``

    Yields:
        text and both arrays
    """
    streams = [iter(first), iter(second)]
    rests = [(b"", np.zeros(0))] * 2
    while True:
        for i, stream in enumerate(streams):
            if not rests[i][0]:
                rests[i] = next(stream, (b"", None))
        (text, a), (other, b) = rests
        size = min(len(text), len(other))
        if not size:
            return
        yield text[:size], a[:size], b[:size]
        rests = [(text[size:], a[size:]), (other[size:], b[size:])]


def whole_lines(parts):
    """Cut a text between lines. A line of more than ``LONGEST_LINE`` bytes counts as several.

    Args:
        parts (iterable): tuples of text and arrays ``[len(text)]``

    Yields:
        the same text in other parts, with the arrays
    """
    rest, rests = b"", None
    for text, *arrays in parts:
        rests = arrays if rests is None else [np.append(a, b) for a, b in zip(rests, arrays)]
        rest += text
        end = rest.rfind(b"\n") + 1
        end += (len(rest) - end) // LONGEST_LINE * LONGEST_LINE
        if end:
            yield (rest[:end], *(array[:end] for array in rests))
            rest, rests = rest[end:], [array[end:] for array in rests]
    if rest:
        yield (rest, *rests)


def lines(text, *arrays):
    """The lines of a text that :func:`whole_lines` gave, with their newlines, and the sum of each
    array over each line: tuples of bytes and floats."""
    found = list(split_lines([text]))
    starts = np.cumsum([0, *map(len, found[:-1])])
    return zip(found, *(np.add.reduceat(array, starts).tolist() for array in arrays))


class Blocks:
    """Sums over stretches of ``BLOCK`` bytes of text; the last one may be shorter. They are the
    same to the last bit wherever the parts of the text end."""

    def __init__(self):
        self.size = 0
        self._sums = np.zeros(0)

    def add(self, values):
        """Count the next bytes: an array of a value for each."""
        places = (self.size + np.arange(len(values))) // BLOCK
        self.size += len(values)
        blocks = -(-self.size // BLOCK)
        if blocks > len(self._sums):
            # Room for twice as many, so that a long text is not copied again and again.
            self._sums = np.append(self._sums, np.zeros(blocks + len(self._sums)))
        np.add.at(self._sums, places, values)

    @property
    def sums(self):
        """The sum of each stretch, ``[blocks]``."""
        return self._sums[: -(-self.size // BLOCK)]
