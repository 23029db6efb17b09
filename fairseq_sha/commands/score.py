"""Print what a text costs a trained model, given all of the text before each token.

    fairseq-sha score --path checkpoint.pt FILE [--per-line] [--html PICTURE.html]

FILE may be - for standard input. Prints nats per token, bits per byte and perplexity of the whole
text. For models of bytes also bits per byte of each kind of byte: letters that begin a word, other
letters, digits, markup of XML and wiki, white space, other signs.

--dynamic has the weights learn from the text while it is read, see fairseq-sha evaluate.
"""

import html
import math
import re
from pathlib import Path

from fairseq_sha.commands.common import (
    add_dynamic_arguments,
    add_model_arguments,
    check_dynamic,
    check_new,
    dynamic_policy,
    load_model,
    read_text,
)
from fairseq_sha.files import write_atomically

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
COLOURS = 16
BITS_PER_COLOUR = 0.5


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="the text; - is standard input")
    parser.add_argument("--per-line", action="store_true", help="print the cost of each line")
    parser.add_argument("--per-token", action="store_true", help="print the cost of each token")
    parser.add_argument("--html", type=Path, metavar="PICTURE", help="the text, coloured by cost")
    add_dynamic_arguments(parser)


def run(args):
    """Score and print."""
    if args.html:
        check_new([args.html])
    check_dynamic(args)
    data = read_text(args.file)
    model = load_model(args)
    policy = dynamic_policy(args, model) if args.dynamic else None
    score, tokens, nats = model.costs(data, progress=True, policy=policy)
    name = "standard input" if str(args.file) == "-" else str(args.file)
    bits = model.codec.spread(data, nats / math.log(2))
    if args.per_token:
        print_tokens(model.codec, tokens, nats)
    if args.per_line:
        print_lines(data, bits)
    if score is None:
        total = f"{len(data):,} bytes"
    elif model.codec.lossless:
        total = f"{score}; {-(-bits.sum() // 8):,.0f} bytes when compressed"
    else:
        total = f"{score}; {(tokens == model.dictionary.unk()).sum():,} unknown words"
    print(f"{name}: {total}")
    rows = by_kind(data, bits) if model.codec.name == "bytes" else []
    if rows:
        print(table(rows))
    if args.html:
        write_atomically(args.html, picture(name, total, rows, data, bits))


def print_tokens(codec, tokens, nats):
    """Bits of each token, and its text."""
    texts = {t: codec.decode([t]).decode("utf-8", "backslashreplace") for t in set(tokens.tolist())}
    for token, cost in zip(tokens.tolist(), nats / math.log(2)):
        print(f"{cost:.3f}\t{texts[token]!r}")


def print_lines(data, bits):
    """Bits per byte and bits of each line, including its newline, and the line."""
    for match in re.finditer(rb"[^\n]*\n|[^\n]+", data):
        cost = bits[match.start() : match.end()]
        text = match[0].decode("utf-8", "backslashreplace").rstrip("\n")
        print(f"{cost.mean():.3f}\t{cost.sum():.1f}\t{text}")


def kinds_of_bytes(data):
    """The kind of each byte, as its place in :data:`KINDS`: uint8 array ``[len(data)]``."""
    import numpy as np

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


def by_kind(data, bits):
    """Rows of kind, number of bytes, and their bits in all."""
    import numpy as np

    kinds = kinds_of_bytes(data)
    counts = np.bincount(kinds, minlength=len(KINDS))
    totals = np.bincount(kinds, weights=bits, minlength=len(KINDS))
    return [
        (name, int(count), float(total))
        for name, count, total in zip(KINDS, counts, totals)
        if count
    ]


def table(rows):
    """:func:`by_kind` in Markdown."""
    size, total = (sum(row[column] for row in rows) for column in (1, 2))
    lines = ["| kind | bytes | bits per byte | share of bytes | of bits |", "| --- " * 5 + "|"]
    for kind, count, bits in rows:
        shares = f"{count / size:.1%} | {bits / total:.1%}"
        lines.append(f"| {kind} | {count:,} | {bits / count:.3f} | {shares} |")
    return "\n".join(lines)


def picture(title, total, rows, data, bits):
    """A self-contained page of HTML: the text, each byte on a background that shows its cost. A
    character of several bytes shows their mean."""
    import numpy as np

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
    import numpy as np

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
