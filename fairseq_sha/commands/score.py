"""What each byte of a text costs a trained model, in bits, given all bytes before it.

    fairseq-sha score --path checkpoint.pt FILE [--per-line] [--html PICTURE.html]

FILE may be - for standard input. Prints bits per byte of the whole, and of each kind of byte:
letters that begin a word, the other letters, digits, markup of XML and wiki, white space, other
signs.
"""

import html
import re
import sys
from pathlib import Path

import numpy as np

from fairseq_sha.commands.common import check_new, load, model_parser, write

# A byte is of the first kind that matches; bytes beyond ASCII are letters.
MARKUP = rb"<[^<>\n]*>|&(?:[a-z]+|#\d+);|\[+|\]+|\{+|\}+|\|+|'{2,}|={2,}|^[*#:;]+"
KINDS = {
    "markup": MARKUP,
    "digits": rb"[0-9]+",
    "words": rb"[A-Za-z\x80-\xff]+",
    "white space": rb"\s+",
    "other signs": rb".",
}
FIRST_LETTERS, OTHER_LETTERS = "first letters of words", "other letters"
COLOURS = 16
BITS_PER_COLOUR = 0.5


def main(argv=None):
    parser = model_parser("score", __doc__)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="what to score; - is standard input"
    )
    parser.add_argument("--per-line", action="store_true", help="print the cost of each line")
    parser.add_argument("--html", type=Path, metavar="PICTURE", help="the text, coloured by cost")
    args = parser.parse_args(argv)
    if args.html:
        check_new([args.html])
    from_input = args.file == Path("-")
    data = sys.stdin.buffer.read() if from_input else args.file.read_bytes()
    model = load(args)
    bits = model.bits(data, progress=True)
    name = "standard input" if from_input else str(args.file)
    if args.per_line:
        print_lines(data, bits)
    total = summary(data, bits)
    print(f"{name}: {total}")
    rows = by_kind(data, bits)
    if rows:
        print(table(rows))
    if args.html:
        write(args.html, picture(name, total, rows, data, bits))


def summary(data, bits):
    if not data:
        return "0 bytes"
    return (
        f"{len(data):,} bytes, {bits.mean():.3f} bits per byte, "
        f"{-(-bits.sum() // 8):,.0f} bytes when compressed"
    )


def print_lines(data, bits):
    """Bits per byte and bits of each line, with its newline, and the line."""
    for match in re.finditer(rb"[^\n]*\n|[^\n]+", data):
        cost = bits[match.start() : match.end()]
        text = match[0].decode("utf-8", "replace").rstrip("\n")
        print(f"{cost.mean():.3f}\t{cost.sum():.1f}\t{text}")


def kinds_of(data):
    """The kind of each byte: a list of ``len(data)`` names."""
    pattern = b"|".join(b"(%s)" % kind for kind in KINDS.values())
    names, kinds = list(KINDS), []
    for match in re.finditer(pattern, data, re.MULTILINE | re.DOTALL):
        kind, length = names[match.lastindex - 1], match.end() - match.start()
        if kind == "words":
            kinds += [FIRST_LETTERS] + [OTHER_LETTERS] * (length - 1)
        else:
            kinds += [kind] * length
    return kinds


def by_kind(data, bits):
    """Rows of kind, number of bytes, and their bits in all."""
    kinds = np.array(kinds_of(data), dtype=object)
    order = [FIRST_LETTERS, OTHER_LETTERS, *(kind for kind in KINDS if kind != "words")]
    chosen = ((kind, kinds == kind) for kind in order)
    return [(kind, int(where.sum()), bits[where].sum()) for kind, where in chosen if where.any()]


def table(rows):
    """:func:`by_kind` in Markdown."""
    size, total = (sum(row[column] for row in rows) for column in (1, 2))
    lines = ["| kind | bytes | bits per byte | share of bytes | of bits |", "| --- " * 5 + "|"]
    for kind, count, bits in rows:
        shares = f"{count / size:.1%} | {bits / total:.1%}"
        lines.append(f"| {kind} | {count:,} | {bits / count:.3f} | {shares} |")
    return "\n".join(lines)


def picture(title, total, rows, data, bits):
    """A page of HTML, complete in itself: the text, each byte with a background that says what it
    cost. A character of several bytes has their mean."""
    step = BITS_PER_COLOUR
    ranges = [f"{i * step:g} to {(i + 1) * step:g} bits" for i in range(COLOURS - 1)]
    ranges.append(f"{step * (COLOURS - 1):g} bits or more")
    # From white over yellow to red, evenly in lightness, and legible under black text.
    shades = [(48 - 48 * x, 100, 100 - 45 * x) for x in np.linspace(0, 1, COLOURS)]
    styles = [
        f".c{i}{{background:hsl({h:.0f} {s}% {lightness:.0f}%)}}"
        for i, (h, s, lightness) in enumerate(shades)
    ]
    legend = [f'<span class="c{i}">{i * step:g}</span>' for i in range(COLOURS)]
    cells = "".join(
        f"<tr><td>{kind}<td>{count:,}<td>{cost / count:.3f}\n" for kind, count, cost in rows
    )
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body{{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
body{{color:#000;background:#fff}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5}}
td{{padding-right:2em}} td+td{{text-align:right}} .legend span{{padding:0 .4em}}
{"".join(styles)}
</style>
<h1>{html.escape(title)}</h1>
<p>{total}</p>
<table><tr><th>kind<th>bytes<th>bits per byte
{cells}</table>
<p class="legend">bits per byte, from {" ".join(legend)}</p>
<pre>{"".join(runs(data, bits, ranges))}</pre>
</html>
"""


def runs(data, bits, ranges):
    """HTML of the text: a span for each run of characters of one colour."""
    sums = np.concatenate([[0], np.cumsum(bits)])
    start, colour, text = 0, None, []
    for character in data.decode("utf-8", "surrogateescape"):
        end = start + len(character.encode("utf-8", "surrogateescape"))
        cost = (sums[end] - sums[start]) / (end - start)
        now = min(int(cost / BITS_PER_COLOUR), COLOURS - 1)
        if now != colour and text:
            yield span(colour, ranges, text)
            text = []
        colour, start = now, end
        text.append(shown(character))
    if text:
        yield span(colour, ranges, text)


def span(colour, ranges, text):
    return f'<span class="c{colour}" title="{ranges[colour]}">{"".join(text)}</span>'


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


if __name__ == "__main__":
    sys.exit(main())
