"""A text as HTML, each character on a background that shows its cost, or the difference of two.

A page needs no other file. A text of more than ``PAGE`` bytes becomes a folder of pages, whose
index has a curve of the cost and a link to each page.
"""

import contextlib
import html
import math
from typing import List, NamedTuple

import numpy as np

from fairseq_sha.files import unfinished_folder, write_atomically
from fairseq_sha.reading.texts import BLOCK, Blocks

PAGE = 200_000  # bytes of text
POINTS = 1_000  # of the curve, at most
MOST = 1e6  # bits of a byte: beyond all colours
WIDTH, HEIGHT, MARGIN = 960, 240, 50  # of the curve in pixels


class Scale(NamedTuple):
    """Colours of values, each for a range of them. Values beyond the ends have the last colour."""

    quantity: str
    note: str  # of the legend
    low: float  # where the first range begins
    step: float
    colours: List[str]  # CSS
    ranges: List[str]  # in words, for those who do not see colours
    labels: List[str]  # of the legend

    def index(self, value):
        """The place of a value's colour."""
        place = (value - self.low) / self.step
        if place < 0:
            return 0
        return int(place) if place < len(self.colours) else len(self.colours) - 1

    def styles(self):
        return "".join(f".c{i}{{background:{colour}}}" for i, colour in enumerate(self.colours))

    def legend(self):
        spans = (f'<span class="c{i}">{label}</span>' for i, label in enumerate(self.labels))
        return f'<p class="legend">{self.quantity}{self.note} {" ".join(spans)}</p>'


def _scale_of_costs(colours=16, step=0.5):
    ranges = [f"{i * step:g} to {(i + 1) * step:g} bits" for i in range(colours - 1)]
    ranges.append(f"{step * (colours - 1):g} bits or more")
    # From white over yellow to red, evenly in lightness, and legible under black text.
    shades = [
        f"hsl({48 - 48 * x:.0f} 100% {100 - 45 * x:.0f}%)" for x in np.linspace(0, 1, colours)
    ]
    labels = [f"{i * step:g}" for i in range(colours)]
    return Scale("bits per byte", ", from", 0.0, step, shades, ranges, labels)


def _scale_of_differences(colours=8, step=0.5):
    """White in the middle, ``colours`` shades of blue for A and as many of red for B."""
    shades, ranges, labels = [], [], []
    for i in range(-colours, colours + 1):
        # Never so dark that black text would be hard to read.
        hue, lightness = (215 if i < 0 else 10), 100 - 38 * abs(i) / colours
        shades.append(f"hsl({hue} 90% {lightness:.0f}%)")
        least, most = (abs(i) - 0.5) * step, (abs(i) + 0.5) * step
        end = "bits or more" if abs(i) == colours else f"to {most:g} bits"
        better = "A" if i < 0 else "B"
        text = f"{better} better by {least:g} {end}" if i else f"less than {most:g} bits apart"
        ranges.append(text)
        labels.append(f"{i * step:+g}" if i else "0")
    note = " (blue: A is better; red: B is)"
    return Scale(
        "A - B in bits per byte", note, -(colours + 0.5) * step, step, shades, ranges, labels
    )


COSTS = _scale_of_costs()
DIFFERENCES = _scale_of_differences()

STYLE = """
body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
body{color:#000;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5}
td{padding-right:2em} td+td,th+th{text-align:right} .legend span{padding:0 .4em}
svg{max-width:100%;height:auto} nav a{margin-right:1em}
"""


def table(header, rows):
    """An HTML table.

    Args:
        header (list of str): names of columns
        rows (list of list of str): cells
    """
    head = "".join(f"<th>{html.escape(name)}" for name in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return f"<table><tr>{head}\n" + "\n".join(lines) + "</table>"


def paragraphs(lines):
    """Lines of text as HTML."""
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)


def document(title, scale, body):
    """A page of HTML that needs no other file."""
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}{scale.styles()}
</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def picture(title, summary, data, values, scale=COSTS):
    """The page of a text.

    Args:
        title (str): what it is called
        summary (str): HTML that comes before the text
        data (bytes): the text
        values (ndarray): of each byte, ``[len(data)]``
        scale (Scale): their colours
    """
    body = f"{summary}\n{scale.legend()}\n{coloured(data, values, scale)}"
    return document(title, scale, body)


def coloured(data, values, scale):
    """HTML of a text; a character of several bytes shows the mean of their values."""
    return f"<pre>{''.join(runs(data, values, scale))}</pre>"


def runs(data, values, scale):
    """A span for each run of characters of one colour."""
    # A cost that is not finite must not spread to the characters after it.
    values = np.nan_to_num(values, nan=MOST, posinf=MOST, neginf=-MOST)
    sums = np.concatenate([[0], np.cumsum(values)])
    start, colour, text = 0, None, []
    for character in data.decode("utf-8", "surrogateescape"):
        end = start + len(character.encode("utf-8", "surrogateescape"))
        now = scale.index((sums[end] - sums[start]) / (end - start))
        if now != colour and text:
            yield span(colour, scale, text)
            text = []
        colour, start = now, end
        text.append(shown(character))
    if text:
        yield span(colour, scale, text)


def span(colour, scale, text):
    return f'<span class="c{colour}" title="{scale.ranges[colour]}">{"".join(text)}</span>'


def shown(character):
    """A character as HTML; one that has no picture by its number."""
    code = ord(character)
    if character == "\n":
        return "\u21b5\n"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character != "\t" and not character.isprintable():
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return html.escape(character, quote=False)


def place_of(path, size):
    """Where the picture of a text of so many bytes goes: ``NAME.html`` or, if it needs several
    pages, the folder ``NAME_pages``."""
    return path if size <= PAGE else path.with_name(f"{path.stem}_pages")


class Page(NamedTuple):
    """A page that was written, for the index."""

    name: str
    start: int  # of its first byte
    bytes: int
    value: float  # in all
    beginning: str


class Pages:
    """The pages of a large text, written as the text arrives.

    Args:
        folder (Path): where they go
        title (str): what the text is called
        scale (Scale): colours of values
    """

    def __init__(self, folder, title, scale=COSTS):
        self.folder = folder
        self.title = title
        self.scale = scale
        self.pages = []
        self._blocks = Blocks()
        self._text, self._values = b"", np.zeros(0)

    def add(self, text, values):
        """Take the next part of the text and the value of each of its bytes."""
        self._blocks.add(values)
        self._text += text
        self._values = np.append(self._values, values)
        while len(self._text) > PAGE:
            self._write(end_of_page(self._text), is_last=False)

    def finish(self, summary):
        """Write what is left, and the index.

        Args:
            summary (str): HTML
        """
        if self._text:
            self._write(len(self._text), is_last=True)
        rows = [
            f'<tr><td><a href="{page.name}">{page.name}</a><td>{page.start:,}<td>{page.bytes:,}'
            f"<td>{page.value / page.bytes:.3f}<td>{html.escape(page.beginning)}\n"
            for page in self.pages
        ]
        quantity = self.scale.quantity
        head = f"<tr><th>page<th>first byte<th>bytes<th>{quantity}<th>begins with\n"
        body = (
            f"{summary}\n{curve(self._blocks, self.pages, quantity)}\n"
            f"<table>{head}{''.join(rows)}</table>\n{self.scale.legend()}"
        )
        write_atomically(self.folder / "index.html", document(self.title, self.scale, body))

    def _write(self, size, is_last):
        text, values = self._text[:size], self._values[:size]
        self._text, self._values = self._text[size:], self._values[size:]
        number = len(self.pages) + 1
        start = self.pages[-1].start + self.pages[-1].bytes if self.pages else 0
        beginning = text[:200].decode("utf-8", "replace").split("\n")[0][:50]
        page = Page(f"page{number}.html", start, size, float(values.sum()), beginning)
        links = ['<a href="index.html">index</a>']
        if self.pages:
            links.append(f'<a href="{self.pages[-1].name}">previous</a>')
        if not is_last:
            links.append(f'<a href="page{number + 1}.html">next</a>')
        navigation = f"<nav>{''.join(links)}</nav>"
        mean = f"{page.value / size:.4f}, {self.scale.quantity}"
        line = f"Bytes {start:,} to {start + size - 1:,}: {mean}"
        body = (
            f"{navigation}\n<p>{line}</p>\n{self.scale.legend()}\n"
            f"{coloured(text, values, self.scale)}\n{navigation}"
        )
        title = f"{self.title}, page {number}"
        write_atomically(self.folder / page.name, document(title, self.scale, body))
        self.pages.append(page)


def end_of_page(text):
    """Where a page ends that begins with this text: after a line or, if that is longer than a page,
    between two characters."""
    end = text.rfind(b"\n", 0, PAGE) + 1
    if end:
        return end
    end = PAGE
    while end > PAGE - 4 and text[end] & 0xC0 == 0x80:  # within a character of UTF-8
        end -= 1
    return end


def curve(blocks, pages, quantity):
    """SVG of a quantity along a text; each page is a link.

    Args:
        blocks (Blocks): bits of the text
        pages (list of Page): of the text
        quantity (str): what is drawn
    """
    merged = -(-len(blocks.sums) // POINTS)  # blocks behind a point
    firsts = np.arange(0, len(blocks.sums), merged)
    ends = np.minimum((firsts + merged) * BLOCK, blocks.size)
    sizes = np.diff(ends, prepend=0)
    values = np.add.reduceat(blocks.sums, firsts) / sizes
    values = np.where(np.isfinite(values), values, np.nan)
    ticks = ticks_of(values)
    low, high = ticks[0], ticks[-1]

    def x(offset):
        return MARGIN + (WIDTH - MARGIN) * offset / blocks.size

    def y(value):
        return 10 + (HEIGHT - 40) * (high - value) / (high - low)

    centres = ends - sizes / 2
    points = [f"{x(c):.1f},{y(v):.1f}" for c, v in zip(centres, values) if not math.isnan(v)]
    grid = "".join(
        f'<line x1="{MARGIN}" x2="{WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ccc"/>'
        f'<text x="{MARGIN - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )
    anchors = {0: "start", 4: "end"}
    places = "".join(
        f'<text x="{x(blocks.size * i / 4):.1f}" y="{HEIGHT - 8}" '
        f'text-anchor="{anchors.get(i, "middle")}">{blocks.size * i / 4e6:.2f} MB</text>'
        for i in range(5)
    )
    links = "".join(
        f'<a href="{page.name}"><rect x="{x(page.start):.1f}" y="0" height="{HEIGHT - 25}" '
        f'width="{x(page.start + page.bytes) - x(page.start):.1f}" fill="transparent">'
        f"<title>{page.name}: {page.value / page.bytes:.3f}</title></rect></a>"
        for page in pages
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12" role="img" '
        f'aria-label="{quantity} along the text">{grid}{places}'
        f'<polyline fill="none" stroke="#a33" stroke-width="1.5" points="{" ".join(points)}"/>'
        f"{links}</svg><figcaption>{quantity}: means of {merged * BLOCK:,} bytes. A click opens "
        "the page.</figcaption></figure>"
    )


def ticks_of(values):
    """Round numbers around the values, evenly spaced: a list of two or more."""
    finite = values[~np.isnan(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


class Single:
    """The picture of a text that fits on a page. Arguments as for :class:`Pages`, with the page
    instead of a folder."""

    def __init__(self, path, title, scale=COSTS):
        self.path = path
        self.title = title
        self.scale = scale
        self._text, self._values = [b""], [np.zeros(0)]

    def add(self, text, values):
        """As :meth:`Pages.add`."""
        self._text.append(text)
        self._values.append(values)

    def finish(self, summary):
        """As :meth:`Pages.finish`."""
        data, values = b"".join(self._text), np.concatenate(self._values)
        write_atomically(self.path, picture(self.title, summary, data, values, self.scale))


@contextlib.contextmanager
def drawn(path, title, size, scale=COSTS):
    """The picture of a text, which appears when it is complete.

    Args:
        path (Path): see :func:`place_of`; None for no picture
        title (str): what the text is called
        size (int): its bytes
        scale (Scale): colours of values

    Yields:
        a :class:`Single` or :class:`Pages`, or None
    """
    if path is None:
        yield None
    elif size <= PAGE:
        yield Single(path, title, scale)
    else:
        with unfinished_folder(place_of(path, size)) as folder:
            yield Pages(folder, title, scale)
