r"""Turn any text into a data-bin folder of words like those of WikiText, and words back into text.

    python preprocess/words.py --input FILE --dest data-bin/NAME
    python preprocess/words.py --input FILE --dest data-bin/NAME --lang de --min-count 1 \
        --max-size 30000 --valid-percent 10 --test-percent 10

The text is UTF-8, and a line of it is an item. sacremoses normalises the punctuation and splits
off words and signs. As in WikiText, a hyphen inside a word becomes @-@, and a comma or a point
between digits @,@ or @.@. The last part of the file becomes the test split, and the part before it
the valid split; a line that lies across the cut belongs to the earlier one. The vocabulary is the
words that occur at least 3 times in train (--min-count); all others are <unk>.

sacremoses is slow, about 0.3 MB per second and process; by default each core has a process. It
comes with the extra "words" (pip install 'fairseq-sha[words]').

    python preprocess/words.py --detokenize FILE --output TEXT

joins words to text again; FILE may be -, for what is piped in. What normalisation changed and white
space that was no single space do not come back.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys

from bytes import add_sizes, check_sizes, held_out

from fairseq_sha import files
from fairseq_sha.data import data_bin, word_data_bin
from fairseq_sha.data.data_bin import explained
from fairseq_sha.errors import UserError
from fairseq_sha.signals import SIGNALS

MIN_COUNT = 3  # as in WikiText
CHUNK = 1 << 16  # bytes of text that a process tokenizes at a time

_BETWEEN_DIGITS = re.compile(r"(?<=\d)([,.])(?=\d)")
_JOINED = re.compile(r" @([-,.])@ ")


def main(argv=None):
    args = parse(argv)
    sacremoses(args.lang)
    if args.detokenize is not None:
        detokenize_file(args.detokenize, args.output, args.lang)
        return
    dest = data_bin.checked_dest(args.dest)
    with data_bin.open_input(args.input) as stream:
        cuts = cut(stream, args.input, *held_out(args, stream.seek(0, os.SEEK_END)))
        with Tokenizers(args.lang, args.workers) as tokenizers:
            text = Text(stream, args.input)
            word_data_bin.convert(
                {name: tokenizers.run(text.chunks(*ends)) for name, ends in cuts.items()},
                dest,
                order=args.order,
                min_count=args.min_count,
                max_size=args.max_size,
            )


def parse(argv):
    # --detokenize needs no --dest.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="FILE", help="UTF-8 text to split into words")
    what.add_argument("--detokenize", metavar="FILE", help="words to join to text, or -")
    parser.add_argument("--output", metavar="FILE", help="where --detokenize writes")
    parser.add_argument("--dest", help="data-bin folder to make; an existing one must be empty")
    parser.add_argument("--lang", default="en", help="language of the text (default: en)")
    add_sizes(parser)
    parser.add_argument(
        "--min-count",
        type=data_bin.positive,
        default=MIN_COUNT,
        metavar="N",
        help="words that occur less often in train are <unk> (default: %(default)s)",
    )
    parser.add_argument(
        "--max-size",
        type=data_bin.positive,
        metavar="N",
        help="size of the dictionary, with the four special symbols; rarer words are <unk>",
    )
    word_data_bin.add_order(parser)
    parser.add_argument(
        "--workers",
        type=data_bin.positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenize (default: one for each core)",
    )
    args = parser.parse_args(argv)
    check_sizes(parser, args)
    if (args.input is None) != (args.dest is None):
        parser.error("--input and --dest belong together")
    if (args.detokenize is None) != (args.output is None):
        parser.error("--detokenize and --output belong together")
    return args


def sacremoses(lang):
    """The package. UserError: it is not installed, or does not know the language."""
    try:
        import sacremoses
        from sacremoses.corpus import NonbreakingPrefixes
    except ImportError:
        raise UserError("sacremoses is missing; pip install 'fairseq-sha[words]'") from None
    known = set(NonbreakingPrefixes().available_langs.values())
    # For any other language, sacremoses takes English without a word.
    if lang not in known:
        raise UserError(
            f"sacremoses does not know the language {lang!r}; give --lang one of "
            f"{', '.join(sorted(known))}"
        )
    return sacremoses


def cut(stream, name, valid, test):
    """The first byte and the end of each split, moved forward to the beginning of a line.

    UserError: one of them would be empty.
    """
    total = stream.seek(0, os.SEEK_END)
    begins = [0, *(line_start(stream, total - held) for held in (valid + test, test)), total]
    cuts = dict(zip(("train", "valid", "test"), zip(begins, begins[1:])))
    empty = [split for split, (begin, end) in cuts.items() if begin >= end]
    if empty:
        raise UserError(
            f"{name} has {total:,} bytes, and none of its lines are left for {empty[0]}; give a "
            "larger file or other sizes"
        )
    return cuts


def line_start(stream, position):
    """Where the first line begins that does not begin before ``position``."""
    if position <= 0:
        return 0
    stream.seek(position - 1)
    stream.readline()
    return stream.tell()


class Text:
    """A file of text, read in chunks of whole lines from one end to the other.

    Args:
        stream: seekable binary file
        name (str): what messages call it
    """

    def __init__(self, stream, name):
        self.stream, self.name = stream, name
        self._line = 1

    def chunks(self, begin, end):
        """Yield the text between two positions at which lines begin. UserError: it is not UTF-8."""
        self.stream.seek(begin)
        while begin < end:
            with explained(f"cannot read {self.name}", "run again"):
                data = self.stream.read(min(CHUNK, end - begin))
                begin += len(data)
                if data and begin < end and not data.endswith(b"\n"):
                    rest = self.stream.readline()
                    data += rest
                    begin += len(rest)
            if not data or begin > end:
                raise data_bin.changed(self.name)
            block = word_data_bin.Block(self.name, data, self._line)
            self._line += block.lines
            yield block.text


class Tokenizers:
    """Processes that tokenize text, for use as a context.

    multiprocessing.Pool waits for ever when one of its processes is killed, and reads all of its
    input at once.

    Args:
        lang (str): the language
        workers (int): how many; one is this process
    """

    def __init__(self, lang, workers):
        self.lang, self.workers = lang, workers
        self._pipes, self._processes = [], []

    def __enter__(self):
        context = multiprocessing.get_context("fork")
        # A signal that arrived inside fork would be lost, since Python ignores exceptions there.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for _ in range(self.workers if self.workers > 1 else 0):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(
                    target=work, args=(self.lang, theirs, self._pipes, mask), daemon=True
                )
                process.start()
                self._processes.append(process)
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *exception):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def run(self, chunks):
        """Yield the words of each chunk of text, in order, as bytes. Each process has one chunk.

        UserError: a process was killed.
        """
        if not self._pipes:
            yield from (tokenize(self.lang, chunk) for chunk in chunks)
            return
        chunks = iter(chunks)
        try:
            waiting = collections.deque()
            for pipe, chunk in zip(self._pipes, chunks):
                pipe.send(chunk)
                waiting.append(pipe)
            while waiting:
                pipe = waiting.popleft()
                words = pipe.recv()
                if isinstance(words, Exception):
                    raise words
                for chunk in itertools.islice(chunks, 1):
                    pipe.send(chunk)
                    waiting.append(pipe)
                yield words
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise UserError(
                "a process that tokenizes was killed, perhaps for want of memory; use fewer "
                "--workers"
            ) from None


def work(lang, pipe, pipes, mask):
    """Tokenize what comes through ``pipe`` until the first process closes it or is gone.

    pipes: the first process's ends of all pipes so far, which must not stay open here
    mask: the signals to block
    """
    for number in SIGNALS:  # the first process says that it was stopped, and ends this one
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for other in pipes:
        other.close()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            text = pipe.recv()
            try:
                words = tokenize(lang, text)
            except Exception as error:
                words = error
            pipe.send(words)


@functools.lru_cache(maxsize=1)
def moses(lang):
    """The normalizer, the tokenizer and the detokenizer of a language."""
    package = sacremoses(lang)
    return (
        package.MosesPunctNormalizer(lang),
        package.MosesTokenizer(lang),
        package.MosesDetokenizer(lang),
    )


def tokenize(lang, text):
    """Lines of text as words with spaces between them, UTF-8."""
    normalizer, tokenizer, _ = moses(lang)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line:
            words = tokenizer.tokenize(
                normalizer.normalize(line), aggressive_dash_splits=True, escape=False
            )
            lines[i] = _BETWEEN_DIGITS.sub(r" @\1@ ", " ".join(words))
    return "\n".join(lines).encode()


def detokenize(lang, line):
    """A line of words as text."""
    words = _JOINED.sub(r"\1", line).split()
    return moses(lang)[2].detokenize(words, unescape=False)


def detokenize_file(path, output, lang):
    """Join the words of a file, or of standard input for ``-``, to text."""
    standard = contextlib.nullcontext(sys.stdin.buffer)
    name = "standard input" if path == "-" else path
    problem = f"cannot write {output}", "choose another --output"
    with standard if path == "-" else data_bin.open_input(path) as file:
        with explained(*problem), files.unfinished(output) as temporary:
            with open(temporary, "wb") as target:
                for number, data in enumerate(file, start=1):
                    text = word_data_bin.Block(name, data, number).text
                    end = b"\n" * text.endswith("\n")
                    target.write(detokenize(lang, text).encode() + end)


if __name__ == "__main__":
    data_bin.run(main)
