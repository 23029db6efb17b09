"""A range coder (G. N. N. Martin, 1979) in integers.

``low`` and ``range`` have ``CODE_BITS`` bits. The range is kept at ``CODE_BITS - WORD_BITS`` bits
or more by moving ``WORD_BITS`` bits at a time to the output, high byte first. A carry goes into the
bytes that are already there. Zeros follow after the end of the output, so that those at its end
need not be stored.
"""

from fairseq_sha.packed_file import stream_sizes
from fairseq_sha.portable.model import TOTAL_BITS

CODE_BITS = 56
WORD_BITS = 16
#: The byte that stands before every text: a newline, as in the models of this package.
FIRST = 10


class Encoder:
    """Takes intervals of ``0`` to ``2^TOTAL_BITS``."""

    def __init__(self):
        self.low, self.range, self.out = 0, 1 << CODE_BITS, bytearray()

    def put(self, first, frequency):
        part = self.range >> TOTAL_BITS
        self.low += part * first
        self.range = part * frequency
        if self.low >> CODE_BITS:
            self.low -= 1 << CODE_BITS
            _carry(self.out)
        while self.range >> (CODE_BITS - WORD_BITS) == 0:
            self.out += (self.low >> (CODE_BITS - WORD_BITS)).to_bytes(WORD_BITS // 8, "big")
            self.low = (self.low << WORD_BITS) & ((1 << CODE_BITS) - 1)
            self.range <<= WORD_BITS

    def finish(self):
        """All coded bytes."""
        return finished(bytes(self.out), self.low)


def _carry(out):
    place = len(out) - 1
    while place >= 0:
        out[place] = (out[place] + 1) & 255
        if out[place]:
            return
        place -= 1


def finished(out, low):
    """The shortest end that decodes to what was coded: with a range of at least ``2^(CODE_BITS -
    WORD_BITS)``, there is a number in it whose other bits are zero."""
    kept = CODE_BITS - WORD_BITS
    word = (low + (1 << kept) - 1) >> kept
    out = bytearray(out)
    if word >> WORD_BITS:
        _carry(out)
        word -= 1 << WORD_BITS
    return bytes(out + word.to_bytes(WORD_BITS // 8, "big")).rstrip(b"\0")


class Decoder:
    """Gives back what an :class:`Encoder` was given. Any bytes decode to something."""

    def __init__(self, payload):
        size = CODE_BITS // 8
        self.payload, self.place, self.range = payload, size, 1 << CODE_BITS
        self.code = int.from_bytes(payload[:size].ljust(size, b"\0"), "big")

    def where(self):
        """A number in the next interval."""
        return min(self.code // (self.range >> TOTAL_BITS), (1 << TOTAL_BITS) - 1)

    def take(self, first, frequency):
        """Go past the interval."""
        part = self.range >> TOTAL_BITS
        self.range = part * frequency
        self.code = min(self.code - part * first, self.range - 1)
        while self.range >> (CODE_BITS - WORD_BITS) == 0:
            self.range <<= WORD_BITS
            for _ in range(WORD_BITS // 8):
                more = self.payload[self.place] if self.place < len(self.payload) else 0
                self.code = (self.code << 8) | more
                self.place += 1


def bytes_between(size, streams, first, end):
    """How many bytes of a block the steps from ``first`` to ``end`` go through."""
    return sum(min(end, n) - min(first, n) for n in stream_sizes(size, streams))
