"""Kinds of bytes: letters that begin a word, other letters, digits, markup of XML and wiki, white
space, other signs."""

import re

import numpy as np

# A byte belongs to the first kind that matches. Bytes beyond ASCII are letters.
MARKUP = rb"<[^<>\n]*>|&(?:[a-z]+|#\d+);|\[+|\]+|\{+|\}+|\|+|'{2,}|={2,}|^[*#:;]+"
PATTERNS = {
    "markup": MARKUP,
    "digits": rb"[0-9]+",
    "words": rb"[A-Za-z\x80-\xff]+",
    "white space": rb"\s+",
    "other signs": rb".",
}
#: The kinds of bytes, in the order of the table.
KINDS = [
    "first letters of words",
    "other letters",
    *(name for name in PATTERNS if name != "words"),
]


def kinds_of_bytes(data):
    """The kind of each byte, as its place in :data:`KINDS`: uint8 array ``[len(data)]``. Kinds do
    not depend on other lines."""
    pattern = b"|".join(b"(%s)" % pattern for pattern in PATTERNS.values())
    names, kinds = list(PATTERNS), np.empty(len(data), np.uint8)
    for match in re.finditer(pattern, data, re.MULTILINE | re.DOTALL):
        name = names[match.lastindex - 1]
        if name == "words":
            kinds[match.start()] = KINDS.index("first letters of words")
            kinds[match.start() + 1 : match.end()] = KINDS.index("other letters")
        else:
            kinds[match.start() : match.end()] = KINDS.index(name)
    return kinds


class ByKind:
    """Bytes of each kind, and their costs.

    Args:
        models (int): how many costs each byte has
    """

    def __init__(self, models=1):
        self.counts = np.zeros(len(KINDS), np.int64)
        self.totals = np.zeros((models, len(KINDS)))

    def add(self, text, *bits):
        """Count whole lines: the text, and for each model the bits of each byte."""
        kinds = kinds_of_bytes(text)
        self.counts += np.bincount(kinds, minlength=len(KINDS))
        for totals, of_model in zip(self.totals, bits):
            # One after the other, so that totals do not depend on where the parts of a text end.
            np.add.at(totals, kinds, of_model)

    def rows(self):
        """Of each kind that occurs: its name, how many bytes it has, and for each model their bits
        in all."""
        return [
            (name, int(count), *map(float, totals))
            for name, count, totals in zip(KINDS, self.counts, self.totals.T)
            if count
        ]


def table(rows):
    """:meth:`ByKind.rows` of one model in Markdown."""
    size = sum(count for _, count, _ in rows)
    total = sum(bits for _, _, bits in rows) or 1.0  # a model may be certain of a short text
    lines = ["| kind | bytes | bits per byte | share of bytes | of bits |", "| --- " * 5 + "|"]
    for kind, count, bits in rows:
        shares = f"{count / size:.1%} | {bits / total:.1%}"
        lines.append(f"| {kind} | {count:,} | {bits / count:.3f} | {shares} |")
    return "\n".join(lines)


def table_of_two(rows):
    """:meth:`ByKind.rows` of two models in Markdown."""
    header = "| kind | bytes | A, bits per byte | B | A - B | A - B, bits in all |"
    lines = [header, "| --- " * 6 + "|"]
    for kind, count, a, b in rows:
        figures = f"{a / count:.3f} | {b / count:.3f} | {(a - b) / count:+.3f} | {a - b:+,.0f}"
        lines.append(f"| {kind} | {count:,} | {figures} |")
    return "\n".join(lines)
