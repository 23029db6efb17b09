"""Turn a file of bytes into a data-bin folder that fairseq reads.

The folder holds ``dict.txt`` and, for each of train, valid and test, the pair of files of fairseq's
``MMapIndexedDataset``: ``.bin`` (one uint16 token per byte) and ``.idx`` (where each item lies).
An item is a line: the newline byte is ``</s>`` and ends it. A last line without a newline is an
item without ``</s>``, so a split has exactly as many tokens as bytes.

fairseq itself could write these files, but importing it takes about 5 seconds, longer than the
whole conversion of 100 MB. That is why the few lines that write the index and the dictionary are
here, and why this module needs nothing but numpy. The tests show that the files are identical to
fairseq's.
"""

import argparse
import contextlib
import glob
import os
import secrets
import shutil
import stat
import struct
import sys
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fairseq_sha import signals
from fairseq_sha.errors import UserError, wants_traceback

MINIMUM = 2  # bytes in a split: one to predict from and one to predict
NEWLINE = 10
UNFINISHED = ".partial"  # ends the name of a folder that is being written
CHUNK = 1 << 18  # bytes at a time; small enough for numpy's intermediate arrays to stay in cache
TOKENS = 1 << 20  # tokens at a time

# fairseq's Dictionary: <s>, <pad>, </s>, <unk>, then the symbols; the size a multiple of 8.
EOS = 2
UNK = 3
SPECIALS = 4
MULTIPLE = 8

# fairseq's MMapIndexedDataset.Index: magic, version, code of the dtype, number of items.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.uint32): 9}
LONGEST_ITEM = np.iinfo(np.int32).max


@contextlib.contextmanager
def explained(problem, remedy):
    """Turn an OSError inside the block into a UserError: the problem, its reason, the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem}: {error.strerror or error}; {remedy}") from error


def run(main):
    """Run a script: call ``main()`` and print how long it took.

    A UserError or OSError becomes one line and exit status 1; ``FAIRSEQ_SHA_TRACEBACK=1`` shows
    the traceback instead. A signal that ends the program raises an exception, so that unfinished
    files are removed; the exit status is then 128 + signal, as in a shell.
    """
    signals.end_by_exception()
    started = time.perf_counter()
    try:
        main()
        print(f"took {time.perf_counter() - started:.1f} s")
    except (UserError, OSError) as error:
        if wants_traceback():
            raise
        sys.exit(f"error: {error}")


def argument_parser(description, all_bytes=True):
    """The options that all scripts share, and with ``all_bytes`` that for a dictionary of bytes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dest", required=True, help="data-bin folder to make; an existing one must be empty"
    )
    if all_bytes:
        parser.add_argument(
            "--all-bytes",
            action="store_true",
            help="put all 256 bytes into the dictionary, not only those that occur in train",
        )
    return parser


def positive(text):
    """A whole number of at least 1, as a type of argparse's options."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def file_name(text):
    """The name of a file or folder, as a type of argparse's options. It is empty where a variable
    of the shell is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    return text


def checked_dest(dest):
    """``dest`` as an absolute path.

    UserError: there is something other than an empty folder, or nothing can be written there.
    """
    with explained(f"cannot write {dest}", "choose another --dest"):
        dest = Path(dest).resolve()
        if dest.is_dir():
            check_empty(dest)
        elif dest.exists():
            raise UserError(f"{dest} already exists; remove it or choose another --dest")
        existing = next(folder for folder in (dest, *dest.parents) if folder.exists())
        if not existing.is_dir():
            raise UserError(f"cannot write {dest}: {existing} is a file; choose another --dest")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"cannot write {dest}: {existing} is not writable; choose another --dest"
            )
        for path in existing.glob(f".{glob.escape(dest.name)}.*{UNFINISHED}"):
            print(f"{path}: left by a command that was killed, unless one is running; remove it")
    return dest


def check_empty(folder):
    """UserError if a folder has any content but that of a new file system and our own leftovers."""
    names = [path.name for path in folder.iterdir() if not path.name.endswith(UNFINISHED)]
    names = sorted(set(names) - {"lost+found"})
    if names:
        raise UserError(
            f"{folder} already exists and is not empty (it holds {names[0]}); empty it or choose "
            "another --dest"
        )


def open_input(path):
    """Open a regular file for reading bytes; UserError if that is impossible."""
    with explained(f"cannot read {path}", "check the path and its permissions"):
        # Before opening, since opening a pipe would wait for its writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"cannot read {path}: it is {kind}; give a file")
        return open(path, "rb")


def convert(stream, name, dest, valid, test, all_bytes=False):
    """Write the data-bin folder ``dest`` and print a summary.

    stream: seekable binary file with train, valid and test in this order; ``name`` is for messages
    dest: from ``checked_dest``; it appears (or is filled) when everything is converted, or stays
        as it is
    valid, test: bytes of these splits; train is what comes before them
    all_bytes: also put bytes that do not occur in train into the dictionary

    UserError: a split is smaller than 2 bytes, valid or test has a byte that is not in the
    dictionary, or reading or writing fails.
    """
    convert_splits(cut(stream, name, valid, test), dest, all_bytes)


def convert_splits(splits, dest, all_bytes=False):
    """``convert`` for splits that may come from different streams: Splits, train first."""
    with new_folder(dest) as folder:  # first, so that a dest that cannot be written costs no work
        counts = [split.counts() for split in splits]
        symbols = padded(sorted_symbols(counts[0], all_bytes))
        table = token_of_byte(symbols)
        write_dictionary(symbols, folder / "dict.txt")
        lines = [split.lines(count[NEWLINE]) for split, count in zip(splits, counts)]
        for split, number in zip(splits, lines):
            write_split(split, number, table, folder)

    for split, number in zip(splits, lines):
        print(f"{split.name}: {split.size:,} bytes, {number:,} lines")
    print(f"dictionary: {SPECIALS + len(symbols)} symbols, {np.sum(table != UNK)} of them bytes")
    print(f"data-bin folder: {dest}")


class Split(NamedTuple):
    """A part of the input: ``size`` bytes of ``stream`` from byte ``start`` on."""

    name: str  # train, valid or test
    stream: BinaryIO
    file: str  # what messages call the stream
    start: int
    size: int

    def chunks(self):
        """Yield the bytes as arrays, uint8 [up to CHUNK]."""
        self.stream.seek(self.start)
        remaining = self.size
        while remaining:
            with explained(f"cannot read {self.file}", "run again"):
                data = self.stream.read(min(remaining, CHUNK))
            if not data:
                raise changed(self.file)
            remaining -= len(data)
            yield np.frombuffer(data, dtype=np.uint8)

    def counts(self):
        """How often each byte occurs, int64 [256]."""
        return sum(np.bincount(chunk, minlength=256) for chunk in self.chunks())

    def lines(self, newlines):
        """The number of lines, including a last one without a newline."""
        with explained(f"cannot read {self.file}", "run again"):
            self.stream.seek(self.start + self.size - 1)
            last = self.stream.read(1)
        return int(newlines) + (last != b"\n")


def changed(file):
    """The error for an input that changed while it was read."""
    return UserError(f"{file} changed while it was read; run again when nothing writes to it")


def cut(stream, file, valid, test):
    """The three splits; UserError if one of them would be too small."""
    total = stream.seek(0, os.SEEK_END)
    if total == 0:
        raise UserError(f"{file} is empty; give a file with some bytes in it")
    train = total - valid - test
    if min(train, valid, test) < MINIMUM:
        raise UserError(
            f"{file} has {total:,} bytes: train {train:,}, valid {valid:,}, test {test:,}; "
            f"each needs at least {MINIMUM}; give a larger file or other sizes"
        )
    return (
        Split("train", stream, file, 0, train),
        Split("valid", stream, file, train, valid),
        Split("test", stream, file, train + valid, test),
    )


def sorted_symbols(counts, all_bytes):
    """(symbol, count) of each byte except newline, in the order of fairseq's Dictionary.finalize.

    counts: int [256]; the symbols are decimal byte values; bytes that do not occur are omitted
    unless ``all_bytes``
    """
    symbols = [
        (str(byte), int(counts[byte]))
        for byte in range(256)
        if byte != NEWLINE and (all_bytes or counts[byte])
    ]
    # Most frequent first; ties in the order of the strings, where "100" comes before "99".
    return sorted(symbols, key=lambda symbol: (-symbol[1], symbol[0]))


def padded(symbols):
    """``symbols``, padded with unused ones to a dictionary whose size is a multiple of 8."""
    missing = -(SPECIALS + len(symbols)) % MULTIPLE
    return symbols + [(f"madeupword{i:04d}", 0) for i in range(missing)]


def token_of_byte(symbols):
    """The byte codec as a table: the token of each byte, uint16 [256]; <unk> for a byte that is not
    in the dictionary."""
    table = np.full(256, UNK, dtype=np.uint16)
    table[NEWLINE] = EOS
    for token, (symbol, _) in enumerate(symbols, start=SPECIALS):
        if symbol.isdigit():
            table[int(symbol)] = token
    return table


def write_dictionary(symbols, path):
    """Write (symbol, count) pairs as fairseq's Dictionary.save does, without special symbols."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{symbol} {count}\n" for symbol, count in symbols)


def write_split(split, lines, table, folder):
    """Write the split's .bin and .idx into ``folder``.

    lines: number of lines of the split; the index begins with it, so that knowing it in advance
        lets the split be converted chunk by chunk, in constant memory
    table: see ``token_of_byte``
    UserError: a byte has no token; to map it to <unk> would make every score wrong
    """
    tokens_path, index_path = folder / f"{split.name}.bin", folder / f"{split.name}.idx"
    with open(tokens_path, "wb") as file, line_indexer(index_path, lines) as add_ends:
        position = 0
        for chunk in split.chunks():
            tokens = table[chunk]
            unknown = tokens == UNK
            if unknown.any():
                raise unseen(split, chunk, int(unknown.argmax()), position)
            file.write(tokens)
            add_ends(chunk == NEWLINE)
            position += len(chunk)


def unseen(split, chunk, index, position):
    """The error for byte ``index`` of the chunk that begins at ``position`` of the split."""
    offset = position + index
    return UserError(
        f"byte {chunk[index]} at offset {offset} of the {split.name} split (offset "
        f"{split.start + offset} of {split.file}) does not occur in train; use --all-bytes to make "
        "a dictionary of all 256 bytes"
    )


def finish_split(folder, name, lines, table, stored, dtype=np.uint16):
    """Turn the numbers in a split's .bin file into tokens, in place, and write its .idx.

    lines: number of lines of the split
    table: the token of each number; None if they are tokens
    stored, dtype: of the numbers and of the tokens, which are no wider

    Returns the number of tokens.
    """
    path = folder / f"{name}.bin"
    total = 0
    with open(path, "rb") as numbers, open(path, "r+b") as file:
        with line_indexer(folder / f"{name}.idx", lines, dtype) as add_ends:
            for block in arrays(numbers, stored):
                tokens = block if table is None else table[block]
                file.write(tokens.astype(dtype, copy=False))
                add_ends(tokens == EOS)
                total += len(tokens)
        file.truncate()
    return total


def arrays(file, dtype):
    """Yield the rest of a file as arrays of a dtype, ``[up to TOKENS]``."""
    while True:
        data = file.read(TOKENS * np.dtype(dtype).itemsize)
        if not data:
            return
        yield np.frombuffer(data, dtype)


@contextlib.contextmanager
def line_indexer(path, lines, dtype=np.uint16):
    """Write the index of a split whose items are its ``lines`` lines; see ``index_writer``.

    Yields a function that is told, array after array, which tokens end a line (bool [n]). The last
    line may lack an end.
    """
    position = begin = 0  # in tokens: all so far; the current line
    with index_writer(path, lines, dtype) as add_items:

        def add(ends):
            nonlocal position, begin
            edges = np.append(begin, position + 1 + np.flatnonzero(ends))
            add_items(edges)
            begin = edges[-1]
            position += len(ends)

        yield add
        if begin < position:
            add_items(np.array([begin, position]))


@contextlib.contextmanager
def index_writer(path, items, dtype=np.uint16):
    """Write the index of ``items`` items: header, all their sizes (int32), all offsets (int64).

    dtype: of the tokens in the .bin file, uint16 or uint32

    Yields a function that adds the items between successive ``edges`` (in tokens, int64 [n + 1]).
    Sizes and offsets are two arrays, one after the other in the file; each is written through its
    own handle.
    """
    dtype = np.dtype(dtype)
    header = INDEX_MAGIC + struct.pack("<QBQ", INDEX_VERSION, DTYPE_CODES[dtype], items)
    offsets_begin = len(header) + items * np.dtype(np.int32).itemsize
    with open(path, "wb") as sizes_file, open(path, "r+b") as offsets_file:
        sizes_file.write(header)
        offsets_file.seek(offsets_begin)

        def add_items(edges):
            sizes = np.diff(edges)
            if sizes.size and sizes.max() > LONGEST_ITEM:
                raise UserError(f"a line is longer than the {LONGEST_ITEM:,} tokens of an index")
            sizes_file.write(sizes.astype(np.int32))
            offsets_file.write(edges[:-1].astype(np.int64) * dtype.itemsize)

        yield add_items
        if sizes_file.tell() != offsets_begin:
            raise changed("the input")


@contextlib.contextmanager
def new_folder(dest):
    """Yield an empty folder whose files become those of ``dest``, or vanish if anything fails.

    A new ``dest`` appears at once, by a rename. An existing folder is filled, since it may be a
    mount point, which cannot be replaced. There dict.txt, without which fairseq does not read the
    folder, comes last.

    UserError: an OSError, here or inside the block.
    """
    exists = dest.is_dir()
    # A rename cannot leave the file system: so inside dest if that exists, and beside it if not.
    parent = dest if exists else dest.parent
    # Named before it is made, so that there is no moment at which it would not be removed.
    folder = parent / f".{dest.name}.{secrets.token_hex(4)}{UNFINISHED}"
    try:
        with explained(f"cannot write {dest}", "free some space or choose another --dest"):
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            yield folder
            if exists:
                move_files(folder, dest)
            else:
                os.rename(folder, dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_files(folder, dest):
    """Move all files of a folder into another one on the same file system, dict.txt last; none if
    that fails, or if ``dest`` is no longer empty (UserError)."""
    check_empty(dest)
    names = sorted(os.listdir(folder), key=lambda name: (name == "dict.txt", name))
    try:
        for name in names:
            os.rename(folder / name, dest / name)
    except BaseException:
        for name in names:
            if not (folder / name).exists():
                (dest / name).unlink()
        raise
