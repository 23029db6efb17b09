"""Summarise a run on enwiki6: bits per byte beside compressors, a learning curve, a sample.

    python examples/enwiki6/report.py --data data-bin/enwiki6 --run runs/demo

The folder of the run holds ``checkpoints/``, ``tensorboard/`` and ``test.json``, which
``fairseq-sha evaluate --json`` wrote for the test split. ``learning_curve.png``, ``report.md`` and
``rivals.json``, the compressed sizes, are written there.
"""

import argparse
import io
import json
import logging
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairseq_sha.compare import compressors, texts
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically
from fairseq_sha.trained_model import TrainedModel

#: The best ones, and two that everyone knows.
RIVALS = ("bzip2", "xz", "ppmd-i", "zpaq")
PROMPT = "'''London''' is "
SAMPLE = 600  # bytes
NUCLEUS = 0.9  # sampled from the most probable tokens of this total probability


def main(report, description):
    """Read the options, which are the same for all reports, and write the report."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    args = parser.parse_args()
    try:
        report(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def report(args):
    """Write the report; UserError."""
    logging.getLogger().setLevel(logging.WARNING)  # fairseq sets it to INFO for all packages

    train, test = (Corpus(os.path.join(args.data, split)) for split in ("train", "test"))
    evaluated = read_evaluation(args.run / "test.json")
    check_evaluation(evaluated, test, args.run)
    score = evaluated["bits_per_byte"]
    curves = read_curves(args.run / "tensorboard", "bpc")
    axes = {"ylabel": "bits per byte", "ylim": (1.5, 5), "title": "SHA-RNN on enwiki6"}
    draw(curves, score, args.run / "learning_curve.png", **axes)

    updates = max(step for step, _ in curves["train_inner"])
    lines = [
        "# SHA-RNN on enwiki6",
        "",
        f"| bits per byte, on the {test.total_tokens:,} bytes of test | alone | after train |",
        "| --- | --- | --- |",
        *rivals(args),
        f"| this SHA-RNN | – | {score:.3f} |",
        "",
        f"The model was trained for {updates:,} updates on text from the {train.total_tokens:,}",
        "bytes of train, which are other pages. A compressor alone has seen nothing before test;",
        "after train, it has compressed all of train, and only what test adds is counted.",
        f"Evaluated with {evaluated['policy']}.",
        "",
        f"Learning curve: {args.run}/learning_curve.png",
        "",
        f"Sample of the model after {PROMPT!r}:",
        "",
        *("    " + line for line in sample(args.run, PROMPT, SAMPLE).splitlines()),
        "",
    ]
    write_atomically(args.run / "report.md", "\n".join(lines))


def rivals(args):
    """Lines of the table, the worst first."""
    train, test = (texts.read_text(args.data, split) for split in ("train", "test"))
    rows = compressors.rows(
        train,
        test,
        cache=args.run / "rivals.json",
        only=RIVALS,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    pairs = zip(rows[::2], rows[1::2])  # alone, and after train
    lines = [
        f"| {alone['name']} | {alone['bits']:.3f} | {primed['bits']:.3f} |"
        for alone, primed in sorted(pairs, key=lambda pair: -pair[1]["bits"])
    ]
    missing = compressors.missing(RIVALS)
    if missing:
        print(missing, file=sys.stderr)
    return lines


def read_evaluation(path):
    """What ``fairseq-sha evaluate --json`` wrote."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with fairseq-sha evaluate --json {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def check_evaluation(evaluated, corpus, run):
    """UserError if what :func:`read_evaluation` read is of another split or data folder."""
    if evaluated["tokens"] != len(corpus):
        raise UserError(
            f"{run}/test.json: scored {evaluated['tokens']:,} tokens of {len(corpus):,}; "
            "evaluate again on this data"
        )


def read_curves(folder, name_of_score):
    """A score by update: ``{"train_inner": [(update, score), ...], "valid": ...}``."""
    curves = {}
    for name in ("train_inner", "valid"):
        events = EventAccumulator(str(folder / name)).Reload()
        # A resumed run may have logged an update twice: the later value counts.
        curves[name] = sorted({e.step: e.value for e in events.Scalars(name_of_score)}.items())
    return curves


def draw(curves, score, path, **settings):
    """Draw learning curves and the score of test; ``settings`` are those of the axes."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curves["train_inner"]), label="train", linewidth=1)
    axes.plot(*zip(*curves["valid"]), "o-", label="valid")
    axes.axhline(score, linestyle=":", color="black", label=f"test: {score:.4g}")
    axes.set(xlabel="updates", **settings)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def sample(run, prompt, length):
    """A prompt and the ``length`` tokens with which the model goes on."""
    model = TrainedModel.load(run / "checkpoints" / "checkpoint_last.pt", cpu=True)
    torch.manual_seed(1)
    options = dict(sampling=True, sampling_topp=NUCLEUS)
    text = model.continuation(prompt.encode(), length, **options)
    return prompt + text.decode("utf-8", "replace")


if __name__ == "__main__":
    main(report, __doc__)
