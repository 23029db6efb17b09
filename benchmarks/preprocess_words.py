r"""Words to data-bin: how much faster than ``fairseq-preprocess``, which writes the same files.

    python benchmarks/preprocess_words.py
    python benchmarks/preprocess_words.py --input FILE --megabytes 50

The text is the words and signs of enwiki6 with spaces between them, as in WikiText, repeated to
10 MB, or a file of yours as it is. Both run in this process, so that the
seconds in which fairseq is imported do not count. ``fairseq-preprocess`` runs with one worker, as
we do, and with two.
"""

import argparse
import bz2
import contextlib
import logging
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fairseq import options
from fairseq_cli import preprocess

from fairseq_sha.data import word_data_bin

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "preprocess"))
import enwiki6  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", help="text whose words to convert (default: enwiki6)")
    parser.add_argument("--megabytes", type=float, default=10, help="size of the text")
    parser.add_argument("--repeats", type=int, default=3, help="times each case is run")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    text = Path(args.input).read_bytes() if args.input else words_of_enwiki6()
    size = int(1e6 * args.megabytes)
    text = (text * (size // len(text) + 1))[:size].decode("utf-8", "ignore")

    with tempfile.TemporaryDirectory() as folder:
        paths = {split: Path(folder) / split for split in ("train", "valid")}
        paths["train"].write_text(text, encoding="utf-8")
        paths["valid"].write_text(text[: size // 20], encoding="utf-8")
        cases = {
            "ours": lambda dest: word_data_bin.convert(
                paths, dest, order="fairseq", unknown="always"
            ),
            "fairseq-preprocess, 1 worker": lambda dest: run_fairseq(paths, dest, 1),
            "fairseq-preprocess, 2 workers": lambda dest: run_fairseq(paths, dest, 2),
        }
        times = {name: [] for name in cases}
        for repeat in range(args.repeats):
            outputs = []
            for name, case in cases.items():
                dest = Path(folder) / f"{name}{repeat}"
                start = time.perf_counter()
                with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                    case(dest)
                times[name].append(time.perf_counter() - start)
                outputs.append(files_of(dest))
            assert all(files == outputs[0] for files in outputs), "the files differ"

    words = len(text.split())
    types = len(set(text.split()))
    print(
        f"{size / 1e6:.1f} MB, {words:,} words, {types:,} different ones, medians of "
        f"{args.repeats}; the files are equal\n"
    )
    print("| | seconds | million words per second | time / ours |\n| --- | --- | --- | --- |")
    ours = statistics.median(times["ours"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {words / 1e6 / median:.2f} | {median / ours:.1f} |")


def words_of_enwiki6():
    text = bz2.open(enwiki6.find()).read().decode("utf-8", "ignore")
    return re.sub(r"([^\w\s])", r" \1 ", text).encode()


def run_fairseq(paths, dest, workers):
    argv = ["--only-source", "--destdir", str(dest), "--workers", str(workers)]
    for split, path in paths.items():
        argv += [f"--{split}pref", str(path)]
    preprocess.main(options.get_preprocessing_parser().parse_args(argv))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".log"}


if __name__ == "__main__":
    main()
