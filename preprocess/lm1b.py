"""Make the data-bin folder of the Billion Word benchmark (lm1b).

    python preprocess/lm1b.py --dest data-bin/lm1b

downloads 1-billion-word-language-modeling-benchmark-r13output.tar.gz (1.8 GB) to data-bin/, unless
that file exists. An interrupted download continues where it stopped when the command is run again.

    python preprocess/lm1b.py --dest data-bin/lm1b --input FILE_OR_FOLDER

uses a copy that you have: the tar.gz or the folder that it unpacks to. The tar.gz is unpacked
beside dest for as long as the command runs (4 GB); the result takes as much again.

train is the 99 shards of the training part. test is shard 00000 of the 50 held-out ones, the test
set of published results. valid is shard 00001. (The published scripts of Transformer-XL and SRU++
use 00000 for both, so that they choose models on the test set.)

A sentence is a line. </s>, which ends it, stands for the <S> of published results.

    --vocabulary 1b_word_vocab.txt

takes the words of that file, as the published scripts do. It is part of
github.com/rafaljozefowicz/lm. The first field of each line is a word; <S>, </S> and <UNK> are the
special symbols. Without it, the vocabulary is the words that occur at least 3 times in train. All
others are <unk>.
"""

import contextlib
import os
import tarfile
import tempfile
import zlib
from pathlib import Path

from fairseq_sha.data import data_bin, downloads, known_corpora, word_data_bin
from fairseq_sha.errors import UserError

FILE = "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
URL = f"http://www.statmt.org/lm-benchmark/{FILE}"
SHARDS = 99  # of train
MIN_COUNT = 3
#: What special symbols are called in vocabularies; the text has none of them.
BOUNDARIES, UNKNOWN = {"<S>", "</S>", "<s>", "</s>"}, {"<UNK>", "<unk>"}


def main(argv=None, shards=SHARDS):
    args = parse(argv)
    dest = data_bin.checked_dest(args.dest)
    vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else None
    path = args.input or downloads.download(args.url, dest.with_name(FILE))
    remedy = "give another --input" if args.input else "delete it and run again"
    wanted = wanted_names(shards)
    with contextlib.ExitStack() as stack:
        if Path(path).is_dir():
            found = {file.name: file for file in sorted(Path(path).rglob("news.en*"))}
        else:
            found = stack.enter_context(unpacked(path, wanted, dest, remedy))
        missing = [name for names in wanted.values() for name in names if name not in found]
        if missing:
            raise UserError(f"{path} has no {missing[0]}; {remedy}")
        files = {split: lines(found[name] for name in names) for split, names in wanted.items()}
        word_data_bin.convert(
            files,
            dest,
            order=args.order,
            min_count=args.min_count,
            vocabulary=vocabulary,
            unknown="always" if vocabulary else "learned",
        )
    print(f"valid is {wanted['valid'][0]}, not the shard of test as in the published scripts")
    print("</s> ends each sentence and stands for the <S> of published results")


def parse(argv):
    parser = data_bin.argument_parser(__doc__, all_bytes=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input", type=data_bin.file_name, help="tar.gz or unpacked folder (default: download it)"
    )
    source.add_argument("--url", default=URL, help="where to download from (default: %(default)s)")
    parser.add_argument("--vocabulary", metavar="FILE", help="words, the first field of each line")
    parser.add_argument(
        "--min-count",
        type=data_bin.positive,
        metavar="N",
        help=f"words that occur less often in train are <unk> (default: {MIN_COUNT})",
    )
    word_data_bin.add_order(parser)
    args = parser.parse_args(argv)
    if args.vocabulary and (args.min_count or args.order != "reference"):
        parser.error("--vocabulary has the words in its own order: no --min-count or --order")
    args.min_count = args.min_count or MIN_COUNT
    return args


def wanted_names(shards):
    """The names of the files of each split."""
    return {
        "train": [f"news.en-{i:05}-of-{shards + 1:05}" for i in range(1, shards + 1)],
        "valid": ["news.en.heldout-00001-of-00050"],
        "test": ["news.en.heldout-00000-of-00050"],
    }


def lines(paths):
    """Yield the content of files, so that each begins a line."""
    for path in paths:
        with data_bin.open_input(path) as file:
            data = b"\n"
            for data in word_data_bin.read(file, path):
                yield data
            if not data.endswith(b"\n"):
                yield b"\n"


@contextlib.contextmanager
def unpacked(path, wanted, dest, remedy):
    """Unpack the wanted files of a tar.gz for the length of the block, and yield their paths.

    They are unpacked because their order in the archive need not be that of their names.
    UserError: the archive is damaged, or the disk is full.
    """
    names = {name for names in wanted.values() for name in names}
    parent = dest if dest.is_dir() else dest.parent
    with data_bin.explained(f"cannot write {dest}", "free some space or choose another --dest"):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix=f".{dest.name}.", suffix=data_bin.UNFINISHED, dir=str(parent)
        )
    with folder, data_bin.open_input(path) as file:
        found = {}
        for name, member in members(file, path, remedy):
            if name in names:
                found[name] = Path(folder.name) / name
                copy(member, found[name], path, remedy)
        yield found


def members(file, path, remedy):
    """Yield the name and the stream of each regular file in a tar archive."""
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if member.isfile():
                    yield os.path.basename(member.name), archive.extractfile(member)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise known_corpora.damaged(path, error, remedy) from error


def copy(member, target, path, remedy):
    """Copy a stream of an archive to a file; UserError if the one or the other fails."""
    with data_bin.explained(f"cannot write {target}", "free some space"):
        file = open(target, "wb")
    with file:
        while True:
            try:
                data = member.read(data_bin.CHUNK)
            except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
                raise known_corpora.damaged(path, error, remedy) from error
            if not data:
                return
            with data_bin.explained(f"cannot write {target}", "free some space"):
                file.write(data)


def read_vocabulary(path):
    """The words of a vocabulary file, without special symbols.

    UserError: it is not UTF-8, has no words, or has no symbol for unknown words.
    """
    with data_bin.open_input(path) as file:
        try:
            text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 at byte {error.start:,}; give another --vocabulary"
            ) from None
    words = [line.split()[0] for line in text.split("\n") if line.split()]
    if not words:
        raise UserError(f"{path} is empty; give another --vocabulary")
    if not UNKNOWN.intersection(words):
        raise UserError(f"{path} has no <UNK> for unknown words; add a line <UNK>")
    return [word for word in words if word not in BOUNDARIES | UNKNOWN]


if __name__ == "__main__":
    data_bin.run(main)
