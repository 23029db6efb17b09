"""preprocess/enwiki6_text.py: articles without markup, the same text in each form."""

import bz2
import hashlib
import io

import enwiki6
import enwiki6_text
import pytest

from fairseq_sha import UserError
from fairseq_sha.data import known_corpora
from fairseq_sha.data.codecs import CODECS
from fairseq_sha.data.corpus import Corpus

SPLITS = ("train", "valid", "test")
WIKITEXT = """\
{{Infobox|a=1}}
'''Bold''' and [[City|cities]]<ref name="x">A book, [[p]].</ref>&mdash;\u00e9t\u00e9.

[[File:A.jpg|thumb|A ''picture''<ref/> of [[it]]]]
== History ==
* An  item\u00a0of a <small>list<ref>{{cite|b}}</ref></small>
{| class="wikitable"
| cell
|}
{{quote|text}}
|- style="left over"
[[Category:Cities]][[de:Stadt]] <math>x^2</math>
"""
LINES = ["A &", "Bold and cities\u2014\u00e9t\u00e9.", "History", "An item of a list", ""]


def dump(pages):
    """A dump in XML of (title, namespace, text) triples; a text of None is a redirect."""
    xml = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">\n<siteinfo/>'
    for title, space, text in pages:
        redirect = "" if text is not None else '<redirect title="x"/>'
        text = (
            ("#REDIRECT [[x]]" if text is None else text).replace("&", "&amp;").replace("<", "&lt;")
        )
        xml += f"<page><title>{title}</title><ns>{space}</ns><id>1</id>{redirect}<revision>"
        xml += f"<id>2</id><text>{text}</text></revision></page>\n"
    return (xml + "</mediawiki>\n").encode()


PAGES = [("A &amp;", 0, WIKITEXT), ("B", 0, None), ("Talk:A", 1, "talk"), ("C", 0, "")]
DUMP = dump(PAGES + [(f"Title {i}", 0, f"One [[link{i}]] in words.\n\nTwo") for i in range(99)])


def test_markup_is_stripped():
    ((title, text), *_) = enwiki6_text.articles(io.BytesIO(DUMP))
    assert enwiki6_text.article(title, text).decode().split("\n") == [*LINES, ""]


def test_redirects_and_other_pages_are_left_out():
    titles = [title for title, _ in enwiki6_text.articles(io.BytesIO(DUMP))]
    assert titles == ["A &", *(f"Title {i}" for i in range(99))]


@pytest.fixture(scope="module")
def text():
    return b"".join(enwiki6_text.article(*page) for page in enwiki6_text.articles(io.BytesIO(DUMP)))


@pytest.fixture
def make(tmp_path, text):
    """Run the script on the small dump in place of enwiki6; returns the folder."""
    known = known_corpora.KnownCorpus("small", len(DUMP), hashlib.sha1(DUMP).hexdigest(), 0, 0)
    (tmp_path / "in.bz2").write_bytes(bz2.compress(DUMP))

    def run(kind, *options, size=None):
        dest = tmp_path / kind
        argv = ["--input", str(tmp_path / "in.bz2"), "--as", kind, "--dest", str(dest), *options]
        enwiki6_text.main(argv, known, size or len(text), hashlib.sha1(text).hexdigest())
        return dest

    return run


def test_all_forms_hold_the_same_text(make, text):
    folder = make("text")
    parts = [(folder / f"{split}.txt").read_bytes() for split in SPLITS]
    assert b"".join(parts) == text and all(part.endswith(b"\n") for part in parts)
    assert len(parts[1]) + len(parts[2]) == pytest.approx(len(text) / 10, abs=60)
    for kind, options in (("bytes", ()), ("pieces", ("--vocabulary", "270"))):
        folder = str(make(kind, *options))
        codec = CODECS[kind].load(folder)
        found = [codec.decode(Corpus(f"{folder}/{split}").tokens) for split in SPLITS]
        assert found == parts


def test_text_of_another_release_is_refused(make):
    with pytest.raises(UserError, match="mwparserfromhell makes is not the text of small: .*0.7.2"):
        make("text", size=7)


def test_vocabulary_is_for_pieces(make, capsys):
    with pytest.raises(SystemExit):
        make("text", "--vocabulary", "270")
    assert "--vocabulary is for --as pieces" in capsys.readouterr().err


@pytest.mark.parametrize(
    "package, kind",
    [("mwparserfromhell", "text"), ("tokenizers", "pieces"), ("sacremoses", "words")],
)
def test_without_the_packages(runner, package, kind):
    """Found before the work of a minute."""
    code = f"import sys; sys.modules[{package!r}] = None\nfrom fairseq_sha.data import data_bin\n"
    code += "import enwiki6_text; data_bin.run(enwiki6_text.main)"
    done = runner.code(code, "--as", kind, "--dest", "out", "--input", "nowhere")
    runner.check_error(done, f"{package} is missing", "pip install", files=())


@pytest.mark.long
def test_enwiki6(runner):
    """The SHA-1 of the real text holds."""
    try:
        enwiki6.find()
    except UserError as error:
        pytest.skip(str(error))
    done = runner.script("enwiki6_text", "--as", "text", "--dest", "out")
    assert done.returncode == 0, done.stderr
    assert (runner.folder / "out" / "test.txt").stat().st_size == 142_923
