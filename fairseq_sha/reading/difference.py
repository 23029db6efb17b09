"""The difference between two models, A and B, on one text. It is A less B in bits, so that it is
negative where A predicts better."""

import heapq
from typing import NamedTuple, Optional

from fairseq_sha.compare.intervals import CONFIDENCE, interval
from fairseq_sha.reading.texts import BLOCK

#: Fewer blocks of text say too little about other text.
LEAST_BLOCKS = 10
TOP = 10  # lines
SHOWN = 100  # characters of a line


class Difference(NamedTuple):
    """Bits per byte. Without ends, the text is too short for an interval."""

    value: float
    low: Optional[float]
    high: Optional[float]
    blocks: int

    @property
    def is_resolved(self):
        """Whether the interval leaves out zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)  # nan: neither

    def __str__(self):
        if self.low is None:
            return f"{self.value:+.4f} bits per byte; the text is too short for an interval"
        verdict = "" if self.is_resolved else "; not resolved"
        return (
            f"{self.value:+.4f} bits per byte, {CONFIDENCE:.0%} interval {self.low:+.4f} to "
            f"{self.high:+.4f} over {self.blocks:,} blocks of {BLOCK:,} bytes{verdict}"
        )


def difference(a, b):
    """The :class:`Difference` of two models, whose costs are :class:`~.texts.Blocks`. Blocks are
    drawn with replacement, the same ones for both models; that says nothing about other seeds of
    training."""
    size, blocks = a.size, len(a.sums)
    if blocks < LEAST_BLOCKS:
        return Difference(float(a.sums.sum() - b.sums.sum()) / max(size, 1), None, None, blocks)
    value, low, high = interval(a.sums[None], size, b.sums[None], block_bytes=BLOCK)
    return Difference(float(value), float(low), float(high), blocks)


class Line(NamedTuple):
    """A line and what it costs both models in bits."""

    offset: int  # of its first byte in the text
    bytes: int
    a: float
    b: float
    text: str  # its beginning

    @property
    def difference(self):
        return self.a - self.b

    def as_json(self):
        """For the report: a dict."""
        names = ("offset", "bytes", "a_bits", "b_bits", "text")
        return dict(zip(names, self))


class TopLines:
    """The lines in which one model saves most."""

    def __init__(self):
        self._heaps = [], []  # where A is better, where B is

    def add(self, offset, line, a, b):
        """Take a line (bytes) into account."""
        for heap, gain in zip(self._heaps, (b - a, a - b)):
            # Of lines with the same gain the first one is kept.
            key = (gain, -offset)
            if gain > 0 and (len(heap) < TOP or key > heap[0][:2]):
                text = line[: 4 * SHOWN].decode("utf-8", "backslashreplace").rstrip("\n")[:SHOWN]
                item = (*key, Line(offset, len(line), a, b, text))
                (heapq.heappush if len(heap) < TOP else heapq.heapreplace)(heap, item)

    @property
    def better_by_a(self):
        """The lines in which A saves most bits, the first one first: a list of :class:`Line`."""
        return [item[-1] for item in sorted(self._heaps[0], reverse=True)]

    @property
    def better_by_b(self):
        """As :attr:`better_by_a`."""
        return [item[-1] for item in sorted(self._heaps[1], reverse=True)]


def top_table(found):
    """Lines in Markdown.

    Args:
        found (list of Line): of :class:`TopLines`
    """
    rows = ["| at byte | bytes | A, bits | B | A - B | line |", "| --- " * 6 + "|"]
    for line in found:
        text = line.text.replace("|", "\\|").replace("`", "'")
        figures = f"{line.a:,.1f} | {line.b:,.1f} | {line.difference:+,.1f}"
        rows.append(f"| {line.offset:,} | {line.bytes:,} | {figures} | `{text}` |")
    return "\n".join(rows)
