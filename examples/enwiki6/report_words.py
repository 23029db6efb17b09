"""Summarise a run on the words of enwiki6: perplexity, what its closed vocabulary means, a learning
curve, a sample.

    python examples/enwiki6/report_words.py --data data-bin/enwiki6-words --run runs/demo-words

The folder of the run is as for ``report.py``, and so is what is written there.
"""

import logging
import math
import os

import numpy as np
from report import check_evaluation, draw, main, read_curves, read_evaluation, sample

from fairseq_sha.data.codecs import WordCodec
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.files import write_atomically

PROMPT = "The history of "
SAMPLE = 80  # words and ends of lines


def report(args):
    """Write the report; UserError."""
    logging.getLogger().setLevel(logging.WARNING)  # fairseq sets it to INFO for all packages

    dictionary = WordCodec.load(args.data).dictionary
    test = Corpus(os.path.join(args.data, "test"))
    evaluated = read_evaluation(args.run / "test.json")
    check_evaluation(evaluated, test, args.run)
    perplexity = math.exp(evaluated["nats"] / evaluated["tokens"])
    curves = read_curves(args.run / "tensorboard", "wppl")
    axes = {"ylabel": "perplexity per word", "yscale": "log", "title": "SHA-RNN on words"}
    draw(curves, perplexity, args.run / "learning_curve.png", **axes)

    targets = test.tokens[1:]
    words = targets[targets != dictionary.eos()]
    ends = len(targets) - len(words)
    unknown = int(np.count_nonzero(words == dictionary.unk()))
    known = len(dictionary) - dictionary.nspecial
    rarest = min(dictionary.count[dictionary.nspecial :])
    updates = max(step for step, _ in curves["train_inner"])
    lines = [
        "# SHA-RNN on the words of enwiki6",
        "",
        f"| on the {len(words):,} words and {ends:,} ends of lines of test | |",
        "| --- | --- |",
        f"| perplexity per word | {perplexity:.1f} |",
        f"| bits per byte of the text with <unk> | {evaluated['bits_per_byte']:.3f} |",
        f"| words that are <unk> | {unknown:,} ({unknown / len(words):.1%}) |",
        "",
        f"The model was trained for {updates:,} updates. The end of a line counts as a word.",
        f"Evaluated with {evaluated['policy']}.",
        "",
        f"The vocabulary is closed: it has the {known:,} words that",
        f"occur in train at least {rarest} times. Any other word is <unk>, which costs one symbol",
        "however the word is spelled, and the bytes are those of the text with <unk> in it. So",
        "neither figure can be compared with that of a model of bytes or pieces, or with that of",
        "another vocabulary.",
        "",
        f"Learning curve: {args.run}/learning_curve.png",
        "",
        f"Sample of the model after {PROMPT!r}:",
        "",
        *("    " + line for line in sample(args.run, PROMPT, SAMPLE).splitlines()),
        "",
    ]
    write_atomically(args.run / "report.md", "\n".join(lines))


if __name__ == "__main__":
    main(report, __doc__)
