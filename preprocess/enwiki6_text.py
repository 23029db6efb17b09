r"""Make the text of enwiki6, without wiki markup: as plain text, bytes, pieces or words.

enwiki6 is a piece of English Wikipedia in XML (see enwiki6.py). Its articles are taken out of the
XML, and mwparserfromhell strips the markup. Footnotes, tables, galleries, formulas and links to
files, categories and other languages are left out, and so are redirects and pages that are not
articles. Each paragraph, heading and item of a list is a line; an empty line ends an article.

    pip install --no-deps gensim==4.4.0
    pip install -c constraints.txt '.[enwiki6-text,pieces,words]'
    python preprocess/enwiki6_text.py --as text --dest data-bin/enwiki6-plain
    python preprocess/enwiki6_text.py --as bytes --dest data-bin/enwiki6-text
    python preprocess/enwiki6_text.py --as pieces --dest data-bin/enwiki6-pieces8000
    python preprocess/enwiki6_text.py --as words --dest data-bin/enwiki6-words

Plain text is three files, train.txt, valid.txt and test.txt. All others are data-bin folders. valid
and test are the last two twentieths, to the next end of a line: the same for all. The SHA-1 of the
text is checked, since another release of mwparserfromhell may strip differently.
"""

import bz2
import contextlib
import io
import re
import tempfile
import xml.etree.ElementTree as ElementTree

import enwiki6
import words
from pieces import VOCABULARY, add_vocabulary

from fairseq_sha.data import data_bin, known_corpora, piece_data_bin, pieces
from fairseq_sha.errors import UserError

SHA1 = "ef33283347a802cdb397d560365411048a7e1372"
SIZE = 2_873_175
PARSER = "run 'pip install mwparserfromhell==0.7.2' and run again"

LEFT_OUT = {"ref", "references", "table", "gallery", "math", "timeline", "imagemap", "score"}
#: Links that show no text where they are: to files, categories, and pages in other languages.
NAMESPACES = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z-]+)?|simple)\s*:", re.I)
#: How lines of tables and files begin that are malformed, which the parser takes for text.
REMAINS = re.compile(r"[|!]|{\||thumb\|")


def main(argv=None, known=enwiki6.ENWIKI6, size=SIZE, sha1=SHA1):
    parser = data_bin.argument_parser(__doc__, all_bytes=False)
    parser.add_argument("--as", dest="kind", choices=WRITERS, required=True, help="what to make")
    parser.add_argument(
        "--input",
        type=data_bin.file_name,
        help=f"{enwiki6.FILE} (default: the one in the installed gensim)",
    )
    add_vocabulary(parser)
    args = parser.parse_args(argv)
    if args.vocabulary is not None and args.kind != "pieces":
        parser.error("--vocabulary is for --as pieces")
    mwparserfromhell()
    if args.kind == "pieces":
        pieces.check_package()
    if args.kind == "words":
        words.sacremoses("en")
    dest = data_bin.checked_dest(args.dest)
    path = args.input or enwiki6.find()
    remedy = "give another --input" if args.input else enwiki6.REINSTALL
    with data_bin.open_input(path) as file, bz2.open(file) as packed:
        unpacked = known_corpora.unpack(packed, path, known, remedy)
    known_corpora.verify(unpacked, path, known, remedy)
    unpacked.seek(0)
    text = b"".join(article(title, page) for title, page in articles(unpacked))
    valid, test = held_out(text)
    name = f"the text of {known.name}"
    corpus = known_corpora.KnownCorpus(name, size, sha1, valid, test)
    known_corpora.verify(io.BytesIO(text), "what mwparserfromhell makes", corpus, PARSER)
    WRITERS[args.kind](text, name, dest, valid, test, args)


def articles(stream):
    """Yield title and wikitext of each article of a dump in XML, in order, but not redirects."""
    for _, page in ElementTree.iterparse(stream):
        space, _, tag = page.tag.rpartition("}")
        if tag != "page":
            continue
        found = {
            name: page.find(path.format(space))
            for name, path in (
                ("title", "{0}}}title"),
                ("ns", "{0}}}ns"),
                ("redirect", "{0}}}redirect"),
                ("text", "{0}}}revision/{0}}}text"),
            )
        }
        if found["ns"].text == "0" and found["redirect"] is None and found["text"].text:
            yield found["title"].text, found["text"].text
        page.clear()


def article(title, wikitext):
    """The text of an article as UTF-8: lines, the title first, and an empty one at the end."""
    parser = mwparserfromhell()
    code = parser.parse(wikitext)
    for node in code.filter(matches=is_left_out):
        # Those inside another one went with it, and the parser then raises a ValueError.
        with contextlib.suppress(ValueError):
            code.remove(node)
    lines = [" ".join(line.split()) for line in code.strip_code().split("\n")]
    lines = [line for line in lines if line and not REMAINS.match(line)]
    return "\n".join([title, *lines, "", ""]).encode()


def is_left_out(node):
    nodes = mwparserfromhell().nodes
    if isinstance(node, nodes.Wikilink):
        return NAMESPACES.match(str(node.title)) is not None
    return isinstance(node, nodes.Tag) and str(node.tag).strip().lower() in LEFT_OUT


def held_out(text):
    """Sizes of valid and test in bytes: each ends with a line."""
    first, second = (text.index(b"\n", len(text) * part // 20) + 1 for part in (18, 19))
    return second - first, len(text) - second


def write_text(text, name, dest, valid, test, args):
    """Write the three plain files."""
    with data_bin.new_folder(dest) as folder:
        for split in data_bin.cut(io.BytesIO(text), name, valid, test):
            part = text[split.start : split.start + split.size]
            (folder / f"{split.name}.txt").write_bytes(part)
            print(f"{split.name}: {len(part):,} bytes, {part.count(10):,} lines")
    print(f"folder: {dest}")


def write_bytes(text, name, dest, valid, test, args):
    """Write the data-bin folder of bytes, whose dictionary is all 256."""
    data_bin.convert(io.BytesIO(text), name, dest, valid, test, all_bytes=True)


def write_pieces(text, name, dest, valid, test, args):
    """Write the data-bin folder of pieces."""
    piece_data_bin.convert(io.BytesIO(text), name, dest, valid, test, args.vocabulary or VOCABULARY)


def write_words(text, name, dest, valid, test, args):
    """Write the data-bin folder of words, with the defaults of words.py."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(text)
        file.flush()
        sizes = ["--valid-bytes", str(valid), "--test-bytes", str(test)]
        words.main(["--input", file.name, "--dest", str(dest), *sizes])


WRITERS = {"text": write_text, "bytes": write_bytes, "pieces": write_pieces, "words": write_words}


def mwparserfromhell():
    """The package. UserError: it is not installed."""
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError(f"mwparserfromhell is missing; {PARSER}") from None
    return mwparserfromhell


if __name__ == "__main__":
    data_bin.run(main)
