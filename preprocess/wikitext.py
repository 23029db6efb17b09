"""Make the data-bin folder of WikiText-103 or WikiText-2.

    python preprocess/wikitext.py --corpus 103 --dest data-bin/wikitext-103

downloads wikitext-103-v1.zip (190 MB) to data-bin/, unless that file exists. An interrupted
download continues where it stopped when the command is run again.

    python preprocess/wikitext.py --corpus 103 --dest data-bin/wikitext-103 --input ZIP_OR_FOLDER

uses a copy that you have: the zip, or a folder with wiki.train.tokens and the others.

The variant "tokens" is the one on which perplexities per word are published. Its vocabulary is
closed: every word of valid and test occurs in train, and rare words are <unk>. The folder holds
words. Numbers of lines and words of valid and test and the size of the vocabulary are checked.

The variant "raw" has no <unk> and no published vocabulary. The folder holds bytes, so that models
of bytes can read it, and nothing is checked, since its size is not published. Its scores cannot be
compared with those on "tokens", where <unk> stands for all rare words.
"""

import contextlib
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from fairseq_sha.data import data_bin, downloads, known_corpora, word_data_bin
from fairseq_sha.errors import UserError

URL = "https://wikitext.smerity.com/{}"
SPLITS = ("train", "valid", "test")
VARIANTS = ("tokens", "raw")
# Of the words of a "tokens" file, 0.4% (WikiText-103) or more are <unk>; in a "raw" file at most a
# few are, where an article quotes it.
MOST_UNKNOWN = 0.001


class Expected(NamedTuple):
    """What the variant "tokens" must look like; words are without the ends of lines."""

    lines: dict  # of split to number
    words: dict
    vocabulary: int  # with </s> and <unk>


_LINES, _WORDS = {"valid": 3_760, "test": 4_358}, {"valid": 213_886, "test": 241_211}
CORPORA = {
    "103": Expected(_LINES, _WORDS, 267_735),
    "2": Expected(_LINES, _WORDS, 33_278),
}


def main(argv=None, corpora=CORPORA):
    args = parse(argv)
    dest = data_bin.checked_dest(args.dest)
    name = zip_name(args.corpus, args.variant)
    url = args.url or URL.format(name)
    path = args.input or downloads.download(url, dest.with_name(name))
    remedy = "give another --input" if args.input else "delete it and run again"
    with opened(path, args.variant, remedy) as files:
        if args.variant == "raw":
            convert_raw(files, dest, args.all_bytes, remedy)
        else:

            def check(summary):
                compare(summary, corpora[args.corpus], path, args.corpus, remedy)

            word_data_bin.convert(files, dest, order=args.order, unknown="never", check=check)


def parse(argv):
    parser = data_bin.argument_parser(__doc__)
    parser.add_argument("--corpus", choices=sorted(CORPORA), required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="tokens", help="default: tokens")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input",
        type=data_bin.file_name,
        help="zip or unpacked folder (default: download the zip)",
    )
    source.add_argument("--url", help=f"where to download from (default: {URL.format('...')})")
    word_data_bin.add_order(parser)
    args = parser.parse_args(argv)
    if args.variant == "tokens" and args.all_bytes:
        parser.error("--all-bytes is for --variant raw")
    if args.variant == "raw" and args.order != "reference":
        parser.error("--order is for --variant tokens")
    return args


def zip_name(corpus, variant):
    return f"wikitext-{corpus}-{'raw-' if variant == 'raw' else ''}v1.zip"


@contextlib.contextmanager
def opened(path, variant, remedy):
    """Yield the three files of a zip or a folder as seekable streams, by split.

    UserError: there is no such file, or it holds something else.
    """
    with contextlib.ExitStack() as stack:
        if Path(path).is_dir():
            found = {file.name: file for file in Path(path).iterdir()}
            files = choose(found, path, variant, remedy)
            yield {split: stack.enter_context(data_bin.open_input(files[split])) for split in files}
            return
        file = stack.enter_context(data_bin.open_input(path))
        try:
            archive = stack.enter_context(zipfile.ZipFile(file))
            found = {Path(name).name: name for name in archive.namelist()}
            files = choose(found, path, variant, remedy)
            members = {s: stack.enter_context(archive.open(name)) for s, name in files.items()}
        # RuntimeError: an encrypted member.
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise known_corpora.damaged(path, error, remedy) from error
        yield {split: Member(member, path, remedy) for split, member in members.items()}


def choose(found, path, variant, remedy):
    """What ``found`` (a dict by file name) has under the names of the variant, by split."""
    names = {split: f"wiki.{split}.{variant}" for split in SPLITS}
    missing = [name for name in names.values() if name not in found]
    if missing:
        other = VARIANTS[variant == "tokens"]
        if all(f"wiki.{split}.{other}" in found for split in SPLITS):
            raise UserError(
                f"{path} holds the variant {other}, not {variant}; use --variant {other} or "
                f"{remedy}"
            )
        raise UserError(f"{path} has no {missing[0]}; {remedy}")
    return {split: found[name] for split, name in names.items()}


class Member:
    """A file in a zip, whose damage is a UserError."""

    def __init__(self, member, path, remedy):
        self._member, self._path, self._remedy = member, path, remedy
        self.name = f"{path}/{member.name}"

    def read(self, size):
        return self._explained(self._member.read, size)

    def seek(self, *position):
        return self._explained(self._member.seek, *position)

    def _explained(self, method, *args):
        try:
            return method(*args)
        except (EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise known_corpora.damaged(self._path, error, self._remedy) from error


def convert_raw(files, dest, all_bytes, remedy):
    """Write the bytes of the three files."""
    splits = []
    for split, file in files.items():
        size = file.seek(0, 2)
        file.seek(0)
        sample = file.read(data_bin.CHUNK)
        words, unknown = len(sample.split()), sample.split().count(b"<unk>")
        if unknown > MOST_UNKNOWN * words:
            raise UserError(
                f"{file.name} is not raw: {unknown:,} of its first {words:,} words are <unk>; use "
                f"--variant tokens or {remedy}"
            )
        if size < data_bin.MINIMUM:
            raise UserError(f"{file.name} has {size} bytes; {remedy}")
        splits.append(data_bin.Split(split, file, file.name, 0, size))
    data_bin.convert_splits(splits, dest, all_bytes)


def compare(summary, expected, path, corpus, remedy):
    """UserError that names all that differs from what is published."""
    if summary.splits["train"].unknown <= MOST_UNKNOWN * summary.splits["train"].words:
        raise UserError(
            f"{path} has {summary.splits['train'].unknown:,} <unk> in train, far fewer than the "
            f"variant tokens; use --variant raw for raw text or {remedy}"
        )
    found = {}
    for split in ("valid", "test"):
        counts = summary.splits[split]
        found[f"lines in {split}"] = counts.lines, expected.lines[split]
        found[f"words in {split}"] = counts.words, expected.words[split]
    found["words in the vocabulary with </s>"] = summary.types + 1, expected.vocabulary
    wrong = [
        f"{have:,} {what}, not {want:,}" for what, (have, want) in found.items() if have != want
    ]
    if wrong:
        raise UserError(f"{path} is not WikiText-{corpus}: {'; '.join(wrong)}; {remedy}")


if __name__ == "__main__":
    data_bin.run(main)
