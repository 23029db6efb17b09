"""Have one model read a text, or two, and print, draw and write what it costs them."""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple, Optional

from tqdm import tqdm

from fairseq_sha.reading import difference, json_report, kinds, picture, texts


class Wanted(NamedTuple):
    """What is wanted besides the total."""

    lines: bool = False
    tokens: bool = False
    html: Optional[Path] = None
    json: Optional[Path] = None


class Reader:
    """A model that reads a text once.

    Args:
        trained (~fairseq_sha.trained_model.TrainedModel): the model
        path (str): of its checkpoint
        options: of :class:`~fairseq_sha.trained_model.Reading`
    """

    def __init__(self, trained, path, **options):
        self.trained = trained
        self.path = path
        self.codec = trained.codec
        self.unknown = None if self.codec.lossless else 0
        self._options = options
        self._reading = None

    def read(self, text, on_part=None):
        """Read a text.

        Args:
            text (Text): the text
            on_part (callable): is called with the tokens and the nats of each part

        Yields:
            pairs of text and the bits of each byte, float64 array
        """
        self._reading = self.trained.reading(text.chunks(), **self._options)
        for part, tokens, nats in self._reading:
            bits = self.codec.spread(part, nats / math.log(2))
            if self.unknown is not None:
                self.unknown += int((tokens == self.codec.dictionary.unk()).sum())
            if on_part is not None:
                on_part(tokens, nats)
            yield part, bits

    @property
    def score(self):
        """See :attr:`~fairseq_sha.trained_model.Reading.score`."""
        return self._reading.score

    @property
    def bits(self):
        """What the text cost in all."""
        return self.score.nats / math.log(2) if self.score else 0.0

    def total(self, text):
        """The score in a line."""
        if self.score is None:
            return f"{text.size:,} bytes"
        if self.unknown is not None:
            return f"{self.score}; {self.unknown:,} unknown words"
        if self._options.get("policy"):  # fairseq-sha compress reads in one way only
            return str(self.score)
        return f"{self.score}; {-(-self.bits // 8):,.0f} bytes when compressed"

    def as_json(self):
        """For the report: a dict."""
        return {
            "model": json_report.of_model(self.path, self.trained),
            **json_report.of_score(self.score, self.bits, self.unknown),
        }


def score(text, reader, wanted):
    """Have a model read a text.

    Args:
        text (Text): the text
        reader (Reader): the model
        wanted (Wanted): what to print and write
    """
    by_kind = kinds.ByKind()
    print_part = _token_printer(reader.codec) if wanted.tokens else None
    with contextlib.ExitStack() as stack:
        drawing = stack.enter_context(picture.drawn(wanted.html, text.name, text.size))
        written = stack.enter_context(json_report.written(wanted.json))
        for offset, part, bits in _parts(text, reader.read(text, print_part)):
            by_kind.add(part, bits)
            if drawing:
                drawing.add(part, bits)
            if wanted.lines:
                for line, cost in texts.lines(part, bits):
                    print(f"{cost / len(line):.3f}\t{cost:.1f}\t{_shown(line)}")
                    if written:
                        written.add_line(offset=offset, bytes=len(line), bits=cost)
                    offset += len(line)
        rows = by_kind.rows() if reader.codec.name == "bytes" else []
        total = reader.total(text)
        print(f"{text.name}: {total}")
        if rows:
            print(kinds.table(rows))
        if drawing:
            cells = [[kind, f"{n:,}", f"{bits / n:.3f}"] for kind, n, bits in rows]
            table = picture.table(["kind", "bytes", "bits per byte"], cells)
            drawing.finish(picture.paragraphs([total]) + table)
        if written:
            found = [{"kind": kind, "bytes": n, "bits": bits} for kind, n, bits in rows]
            written.finish(
                file=text.name, bytes=text.size, **reader.as_json(), kinds=found if rows else None
            )


def compare(text, a, b, wanted):
    """Have two models read a text. Arguments as for :func:`score`."""
    by_kind, top = kinds.ByKind(2), difference.TopLines()
    blocks = texts.Blocks(), texts.Blocks()
    scale = picture.DIFFERENCES
    with contextlib.ExitStack() as stack:
        drawing = stack.enter_context(picture.drawn(wanted.html, text.name, text.size, scale))
        written = stack.enter_context(json_report.written(wanted.json))
        both = texts.side_by_side(a.read(text), b.read(text))
        for offset, part, *bits in _parts(text, both):
            by_kind.add(part, *bits)
            for of_model, values in zip(blocks, bits):
                of_model.add(values)
            if drawing:
                drawing.add(part, bits[0] - bits[1])
            for line, *costs in texts.lines(part, *bits):
                top.add(offset, line, *costs)
                if wanted.lines:
                    each = "\t".join(f"{cost / len(line):.3f}" for cost in costs)
                    print(f"{each}\t{costs[0] - costs[1]:+.1f}\t{_shown(line)}")
                    if written:
                        written.add_line(
                            offset=offset, bytes=len(line), a_bits=costs[0], b_bits=costs[1]
                        )
                offset += len(line)
        found = difference.difference(*blocks)
        rows, notes = by_kind.rows(), _notes(a, b)
        heads = [f"{name}, {r.path}: {r.total(text)}" for name, r in (("A", a), ("B", b))]
        heads.append(f"A - B: {found}")
        print("\n".join([text.name, *heads, *notes]))
        print(kinds.table_of_two(rows))
        for name, found_lines in (("A", top.better_by_a), ("B", top.better_by_b)):
            if found_lines:
                print(f"\nLines in which {name} saves most:\n")
                print(difference.top_table(found_lines))
        if drawing:
            cells = [
                [kind, f"{n:,}", f"{x / n:.3f}", f"{y / n:.3f}", f"{(x - y) / n:+.3f}"]
                for kind, n, x, y in rows
            ]
            header = ["kind", "bytes", "A, bits per byte", "B", "A - B"]
            summary = picture.paragraphs([*heads, *notes]) + picture.table(header, cells)
            drawing.finish(summary)
        if written:
            written.finish(
                file=text.name,
                bytes=text.size,
                a=a.as_json(),
                b=b.as_json(),
                difference={
                    "bits": a.bits - b.bits,
                    "bits_per_byte": found.value,
                    "low": found.low,
                    "high": found.high,
                    "resolved": found.is_resolved,
                    "block_bytes": texts.BLOCK,
                    "blocks": found.blocks,
                },
                kinds=[
                    {"kind": kind, "bytes": n, "a_bits": x, "b_bits": y} for kind, n, x, y in rows
                ],
                a_better=[line.as_json() for line in top.better_by_a],
                b_better=[line.as_json() for line in top.better_by_b],
                notes=notes,
            )


def _parts(text, read):
    """Whole lines, with the offset of the first one and a progress bar on a terminal."""
    offset = 0
    with tqdm(total=text.size, unit="B", unit_scale=True, disable=None) as bar:
        for part, *arrays in texts.whole_lines(read):
            yield (offset, part, *arrays)
            offset += len(part)
            bar.update(len(part))


def _token_printer(codec):
    """What prints the bits of each token of a part, and its text."""
    shown = {}

    def print_part(tokens, nats):
        for token in set(tokens.tolist()) - set(shown):
            shown[token] = codec.decode([token]).decode("utf-8", "backslashreplace")
        for token, cost in zip(tokens.tolist(), nats / math.log(2)):
            print(f"{cost:.3f}\t{shown[token]!r}")

    return print_part


def _shown(line):
    return line.decode("utf-8", "backslashreplace").rstrip("\n")


def _notes(a, b):
    """What to know about a comparison of two models with different tokens."""
    notes = []
    same = a.codec.dictionary.symbols == b.codec.dictionary.symbols
    for name, reader in (("A", a), ("B", b)):
        if reader.unknown and not same:
            notes.append(
                f"{name} does not know {reader.unknown:,} of the words and pays for one symbol "
                "each, however they are spelled: the scores cannot be compared"
            )
    if {a.codec.name, b.codec.name} != {"bytes"}:
        notes.append("the cost of a token of several bytes is spread evenly over them")
    return notes
