"""Sum up a run on enwiki6: bits per byte beside xz and bzip2, a learning curve, a passage.

    python examples/enwiki6/report.py --data data-bin/enwiki6 --run runs/demo

The run's folder holds ``checkpoints/``, ``tensorboard/`` and ``test.log``, the output of
fairseq-eval-lm on the test split. Writes ``learning_curve.png`` and ``report.md`` there.
"""

import argparse
import bz2
import logging
import lzma
import os
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairseq_sha import UserError
from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.models.sha_rnn import SHARNN

PROMPT = "'''London''' is "
PASSAGE = 600  # bytes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq makes all packages talkative

    dictionary = ByteDictionary.load(os.path.join(args.data, "dict.txt"))
    train, test = (Corpus(os.path.join(args.data, split)) for split in ("train", "test"))
    score, scored = read_score(args.run / "test.log")
    if scored != len(test):
        raise UserError(f"{args.run}/test.log scored {scored:,} tokens of {len(test):,}")
    data = dictionary.decode(test.tokens)
    compressed = {
        "xz -9e": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "bzip2 -9": bz2.compress(data, 9),
    }
    curves = read_curves(args.run / "tensorboard")
    draw(curves, score, args.run / "learning_curve.png")

    rows = [(name, 8 * len(out) / len(data)) for name, out in compressed.items()]
    rows += [("this SHA-RNN", score)]
    updates = max(step for step, _ in curves["train_inner"])
    report = [
        "# SHA-RNN on enwiki6",
        "",
        f"| on the {len(data):,} bytes of test | bits per byte |",
        "| --- | --- |",
        *(f"| {name} | {bits:.3f} |" for name, bits in rows),
        "",
        f"The model was trained for {updates:,} updates on text from the {train.total_tokens:,}",
        "bytes of train, other pages; xz and bzip2 have seen nothing before the test bytes.",
        "",
        f"Learning curve: {args.run}/learning_curve.png",
        "",
        f"What the model wrote after {PROMPT!r}:",
        "",
        *("    " + line for line in passage(args.data, args.run).splitlines()),
        "",
    ]
    unfinished = args.run / "report.md.unfinished"
    unfinished.write_text("\n".join(report), encoding="utf-8")
    unfinished.rename(args.run / "report.md")


def read_score(path):
    """Bits per byte and number of tokens scored, as fairseq-eval-lm printed them."""
    text = path.read_text(encoding="utf-8")
    loss = re.search(r"Loss \(base 2\): ([0-9.]+)", text)
    tokens = re.search(r"Evaluated ([0-9,]+) tokens", text)
    if loss is None or tokens is None:
        raise UserError(f"{path}: holds no score; remove it and evaluate again")
    return float(loss.group(1)), int(tokens.group(1).replace(",", ""))


def read_curves(folder):
    """Bits per byte by update: ``{"train_inner": [(update, bits), ...], "valid": ...}``."""
    curves = {}
    for name in ("train_inner", "valid"):
        events = EventAccumulator(str(folder / name)).Reload()
        # A run that was resumed has logged some updates twice: the later one counts.
        curves[name] = sorted({e.step: e.value for e in events.Scalars("bpc")}.items())
    return curves


def draw(curves, score, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curves["train_inner"]), label="train", linewidth=1)
    axes.plot(*zip(*curves["valid"]), "o-", label="valid")
    axes.axhline(score, linestyle=":", color="black", label=f"test: {score:.3f}")
    axes.set(xlabel="updates", ylabel="bits per byte", ylim=(1.8, 5), title="SHA-RNN on enwiki6")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def passage(data, run):
    """Text that the model goes on with after ``PROMPT``."""
    model = SHARNN.from_pretrained(str(run / "checkpoints"), "checkpoint_last.pt", data)
    torch.manual_seed(1)
    options = dict(sampling=True, sampling_topp=0.9, max_len_b=len(PROMPT) + PASSAGE)
    return model.sample(PROMPT, **options)


if __name__ == "__main__":
    sys.exit(main())
