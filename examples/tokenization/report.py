"""What tokenization does to the score: tables and a picture of finished runs.

    make tokenization

Writes report.md, report.json and entropy.png into the folder of the runs. The cost of each token of
the test split is computed once from each checkpoint and kept beside it.
"""

import argparse
import io
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fairseq_sha.compare.intervals import interval
from fairseq_sha.files import write_atomically

#: The order of the tables. All but words restore every byte of the text.
LOSSLESS = ["bytes", "pieces1000", "pieces8000"]
POSITIONS = 8  # tokens of a word that are told apart
PARTS = ["first token of a word", "later tokens", "white space"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of fairseq-sha compare")
    parser.add_argument("--cpu", action="store_true", help="compute costs on the CPU")
    parser.add_argument("--costs-only", action="store_true", help="only compute costs")
    args = parser.parse_args()
    for folder in sorted(args.run.glob("*/seed*")):
        if (folder / "result.json").is_file() and not (folder / "test_costs.npz").is_file():
            save_costs(folder, args.cpu)
    if args.costs_only:
        return
    models = {name: read(args.run / name) for name in [*LOSSLESS, "words"]}
    content = {name: summarise(runs, models["bytes"]) for name, runs in models.items()}
    write_atomically(args.run / "report.json", json.dumps(content) + "\n")
    text = report(content)
    write_atomically(args.run / "report.md", text)
    write_atomically(args.run / "entropy.png", draw(content))
    print(text)


def save_costs(folder, cpu):
    """Costs of the tokens of test in nats, how many bytes each stands for, and at which place in a
    word it is; see :func:`places`."""
    from fairseq_sha.commands.evaluate import evaluate_split
    from fairseq_sha.trained_model import TrainedModel

    trained = TrainedModel.load(str(folder / "checkpoints" / "checkpoint_last.pt"), cpu=cpu)
    streams = json.loads((folder / "result.json").read_text())["test"]["streams"]
    options = SimpleNamespace(
        split="test", batch_size=streams, tokens_per_sample=None, context_window=0
    )
    _, costs, sizes, _ = evaluate_split(trained, options)
    texts = trained.codec.texts()
    tokens = trained.task.dataset("test").tokens
    at = places([texts[token] for token in tokens])[1:]
    content = io.BytesIO()
    np.savez_compressed(content, costs=costs, sizes=sizes, places=at)
    write_atomically(folder / "test_costs.npz", content.getvalue())


def places(texts):
    """For each token: 1 if a word begins in it, 2 for the next token of that word and so on; 0 for
    white space alone.

    Args:
        texts (list of bytes): of each token
    """
    out, place = [], 0
    for text in texts:
        if not text.strip():
            place = 0
        elif place and not text[:1].isspace():
            place += 1
        else:
            place = 1
        out.append(place)
        if text[-1:].isspace():
            place = 0
    return np.array(out)


def read(folder):
    """Results and costs of a model's seeds."""
    runs = []
    for path in sorted(folder.glob("seed*/result.json")):
        with np.load(path.parent / "test_costs.npz") as file:
            runs.append((json.loads(path.read_text()), dict(file)))
    return runs


def summarise(runs, baseline):
    """The figures of a model, means over seeds."""
    results, costs = zip(*runs)
    tests = [result["test"] for result in results]
    bits, base = (np.array([r["test"]["block_bits"] for r, _ in each]) for each in (runs, baseline))
    seeds = [tuple(result["seed"] for result, _ in each) for each in (runs, baseline)]
    size, words, block = (tests[0][key] for key in ("bytes", "words", "block_bytes"))
    nats = np.mean([test["nats"] for test in tests])
    total = {name: np.mean([select(cost, name) for cost in costs]) for name in PARTS}
    by_place = [
        np.mean([cost["costs"][cost["places"] == k].mean() for cost in costs]) / math.log(2)
        for k in range(1, POSITIONS + 1)
        if (costs[0]["places"] == k).sum() >= 100
    ]
    same_text = bits.shape[1] == base.shape[1]
    return {
        "seeds": seeds[0],
        "parameters": results[0]["parameters"],
        "tokens": tests[0]["tokens"],
        "bytes": size,
        "words": words,
        "nats": nats,
        "bits_per_byte": interval(bits, size, block_bytes=block),
        "difference": interval(bits, size, base, block_bytes=block, seeds=seeds)
        if same_text and runs is not baseline
        else None,
        "valid": np.mean([result["valid"]["bits"] for result in results]),
        "perplexity_per_word": math.exp(nats / words),
        "perplexity_per_token": math.exp(nats / tests[0]["tokens"]),
        "bits_per_word": {name: float(value / words) for name, value in total.items()},
        "bits_by_place": [float(value) for value in by_place],
        "text_read": results[0]["bytes"],
    }


def select(cost, part):
    """Bits of the tokens of a part."""
    at = cost["places"]
    chosen = {PARTS[0]: at == 1, PARTS[1]: at > 1, PARTS[2]: at == 0}[part]
    return cost["costs"][chosen].sum(dtype=float) / math.log(2)


def report(content):
    """The tables, as Markdown."""
    lines = [
        "| tokens | parameters | predicted tokens | bits per byte | difference to bytes | "
        "perplexity per word | per token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in LOSSLESS:
        row = content[name]
        difference = "" if row["difference"] is None else shown(row["difference"], "+.3f")
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['tokens']:,} | "
            f"{shown(row['bits_per_byte'], '.3f')} | {difference} | "
            f"{row['perplexity_per_word']:,.0f} | {row['perplexity_per_token']:,.2f} |"
        )
    sizes = {(content[name]["bytes"], content[name]["words"]) for name in LOSSLESS}
    counted = " or ".join(f"{b:,} bytes and {w:,} words" for b, w in sorted(sizes, reverse=True))
    words = content["words"]
    seeds = "; ".join(
        f"{name} {', '.join(map(str, row['seeds']))}" for name, row in content.items()
    )
    lines += [
        "",
        f"Means over seeds ({seeds}) and intervals of 95 %: blocks of 10,000 bytes are drawn by "
        "bootstrap, means over seeds from Student's t distribution. "
        "Differences pair models by seed.",
        f"Denominators: {counted}. They differ by the first token, which is not predicted.",
        "",
        "| bits per word | " + " | ".join(PARTS) + " | together |",
        "| --- " * (len(PARTS) + 2) + "|",
    ]
    for name in LOSSLESS:
        parts = content[name]["bits_per_word"]
        total = sum(parts.values())
        cells = [f"{value:.2f} ({value / total:.0%})" for value in parts.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {total:.2f} |")
    lines += [
        "",
        f"Closed vocabulary of words: perplexity {words['perplexity_per_token']:.1f} per word, "
        f"{words['tokens']:,} words and ends of lines, {words['parameters']:,} parameters.",
    ]
    return "\n".join(lines) + "\n"


def shown(value, form):
    center, low, high = (format(x, form) for x in value)
    return f"{center} [{low}, {high}]"


def draw(content):
    """Left, where the bits of a word are spent; right, bits by place in the word."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes all logs verbose
    figure = Figure(figsize=(10, 4), constrained_layout=True)
    left, right = figure.subplots(1, 2)
    bottom = np.zeros(len(LOSSLESS))
    for part in PARTS:
        heights = np.array([content[name]["bits_per_word"][part] for name in LOSSLESS])
        left.bar(LOSSLESS, heights, bottom=bottom, label=part)
        bottom += heights
    left.set(ylabel="bits per word", title="where the bits of a word are spent")
    left.set_ylim(0, 1.3 * bottom.max())  # room for the legend
    left.legend(loc="upper right")
    for name in LOSSLESS:
        values = content[name]["bits_by_place"]
        right.plot(range(1, len(values) + 1), values, "o-", label=name)
    right.set(
        xlabel="place of the token in its word",
        ylabel="bits per token",
        title="entropy by place",
    )
    right.set_ylim(0, 1.3 * max(max(content[name]["bits_by_place"]) for name in LOSSLESS))
    right.legend(loc="upper right")
    right.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


if __name__ == "__main__":
    main()
