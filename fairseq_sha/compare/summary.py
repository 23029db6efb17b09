"""The results of a comparison: results.json, a table, pictures.

A run is a dict: ``model``, ``seed``, ``parameters``, ``updates``, ``bytes`` (that it was trained
on), ``training_seconds``, ``training_tokens_per_second``, ``peak_memory_mb``, ``device``,
``machine``; for ``valid`` and ``test`` a dict of ``bits`` (per byte), ``tokens`` and
``tokens_per_second``, and from ``fairseq-sha evaluate`` also ``bytes``, ``policy`` and others; and
``train_curve`` and ``valid_curve``, lists of ``[update, bits]``.
"""

import io
import json

from fairseq_sha.compare.logs import mean
from fairseq_sha.files import write_atomically

SMOOTHING = 5  # points of a learning curve
# Names of pictures: the number of a run that an axis is proportional to, and its label.
PICTURES = {
    "bits_by_seconds.png": ("training_seconds", "seconds of training"),
    "bits_by_bytes.png": ("bytes", "bytes seen"),
}


def write_results(path, results):
    """Write all results of a comparison as JSON, one line per run.

    results (dict): ``command``, ``settings``, ``not_finished`` (names of runs), ``runs``
    """
    head = [f"{json.dumps(key)}: {compact(results[key])}," for key in results if key != "runs"]
    runs = ",\n".join(map(compact, results["runs"]))
    write_atomically(path, "{\n" + "\n".join(head) + f'\n"runs": [\n{runs}\n]\n}}\n')


def compact(content):
    """JSON on one line."""
    return json.dumps(content, ensure_ascii=False)


def summarise(results):
    """One row per model, the best on test first.

    Bits are means over seeds, with half of their range. Speed, time and memory are means over those
    seeds only that ran on the machine of the first.

    results (list of dict): finished runs
    """
    models = {}
    for result in results:
        models.setdefault(result["model"], []).append(result)
    rows = []
    for name, runs in models.items():
        row = {"model": name, "seeds": sorted(run["seed"] for run in runs)}
        for split in ("valid", "test"):
            values = [run[split]["bits"] for run in runs]
            row[split] = {
                "bits": mean(values),
                "half_range": (max(values) - min(values)) / 2,
                # fairseq-eval-lm does not say; it reads bytes as tokens.
                "bytes": runs[0][split].get("bytes", runs[0][split]["tokens"]),
                "policy": runs[0][split].get("policy"),
            }
        for key in ("bytes", "updates"):
            row[key] = mean(run[key] for run in runs)
        row["all_timed"] = len(timed(runs)) == len(runs)
        row["machine"] = runs[0]["machine"]
        row["evaluation_tokens_per_second"] = mean(
            run["test"]["tokens_per_second"] for run in timed(runs)
        )
        for key in ("training_tokens_per_second", "training_seconds"):
            row[key] = mean(run[key] for run in timed(runs))
        peaks = [run["peak_memory_mb"] for run in timed(runs) if run["peak_memory_mb"] is not None]
        row["peak_memory_mb"] = max(peaks, default=None)
        row["parameters"] = runs[0]["parameters"]
        rows.append(row)
    # The score of a diverged model is nan; it comes last.
    return sorted(rows, key=lambda row: (row["test"]["bits"] != row["test"]["bits"], score(row)))


def timed(runs):
    """The runs of a model whose times can be averaged: those on the machine of the first."""
    return [run for run in runs if run["machine"] == runs[0]["machine"]]


def score(row):
    return row["test"]["bits"]


def table(rows, settings, missing):
    """The summary as Markdown.

    settings (dict): has ``budget``
    missing (list of str): names of runs that are not finished
    """

    def bits(row, split):
        spread = f" ± {row[split]['half_range']:.3f}" if len(row["seeds"]) > 1 else ""
        return f"{row[split]['bits']:.3f}{spread}"

    lines = [
        "| model | parameters | bits per byte, valid | test | tokens/s, training | "
        "tokens/s, evaluation | peak memory, MB | bytes seen | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["model"], f"{row['parameters']:,}", bits(row, "valid"), bits(row, "test")]
        for key in ("training_tokens_per_second", "evaluation_tokens_per_second"):
            cells.append(f"{row[key]:,.0f}")
        peak = row["peak_memory_mb"]
        cells += ["–" if peak is None else f"{peak:,}", f"{row['bytes']:,.0f}"]
        cells.append(f"{row['training_seconds']:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"The budget was {settings['budget']} of training. Seconds are the number of updates times "
        "the median time of an update,",
        "without validation and checkpoints.",
    ]
    if any(len(row["seeds"]) > 1 for row in rows):
        seeds = ", ".join(f"{row['model']} {len(row['seeds'])}" for row in rows)
        lines += [f"Bits: mean over seeds ± half of their range (seeds: {seeds})."]
    counts = grouped(rows, lambda row: f"{row['test']['bytes']:,}")
    scored = "; ".join(f"{count} ({', '.join(names)})" for count, names in counts.items())
    lines += [
        *([f"Bytes of test that were scored: {scored}."] if rows else []),
        *(
            f"Evaluated with {policy}: {', '.join(names)}."
            for policy, names in grouped(rows, lambda row: row["test"]["policy"]).items()
            if policy is not None
        ),
        "Memory is the main memory of the training process.",
        *(
            f"Speed, seconds and memory were measured on {cpu}: {', '.join(names)}."
            for cpu, names in grouped(rows, lambda row: (row["machine"] or {}).get("cpu")).items()
            if cpu is not None
        ),
    ]
    elsewhere = [row["model"] for row in rows if not row["all_timed"]]
    if elsewhere:
        lines += [
            "Another seed ran on another machine, for as many updates, and counts for bits only: "
            f"{', '.join(elsewhere)}."
        ]
    if missing:
        lines += [f"Not finished: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def grouped(rows, key):
    """Names of models, grouped by ``key(row)``."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row["model"])
    return groups


def curve(runs, split, axis):
    """A learning curve, averaged over seeds.

    axis (str): the number of a run that the position on the axis is proportional to
    Returns positions and bits.
    """
    seeds = [dict(run[f"{split}_curve"]) for run in runs]
    updates = sorted(set.intersection(*map(set, seeds)))
    per_update = mean(run[axis] / run["updates"] for run in runs)
    return (
        [update * per_update for update in updates],
        [mean(points[update] for points in seeds) for update in updates],
    )


def smooth(values):
    """Running mean over ``SMOOTHING`` points, over fewer near both ends."""
    half = SMOOTHING // 2
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(mean(values[i - reach : i + reach + 1]))
    return out


def draw(results, rows, folder):
    """Learning curves against seconds and against bytes; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    for name, (axis, label) in PICTURES.items():
        figure = Figure(figsize=(8, 5), constrained_layout=True)
        axes = figure.add_subplot()
        low, high = [], []
        for row in rows:
            runs = [result for result in results if result["model"] == row["model"]]
            runs = timed(runs) if axis == "training_seconds" else runs
            x, y = curve(runs, "train", axis)
            y = smooth(y)
            text = f"{row['model']}: {row['test']['bits']:.3f}"
            (line,) = axes.plot(x, y, linewidth=1.2, label=text)
            valid_x, valid_y = curve(runs, "valid", axis)
            axes.plot(valid_x, valid_y, "o", markersize=4, color=line.get_color())
            low += [min(y + valid_y)]
            high += [y[len(y) // 10]]  # the first updates would compress the rest
        if low and min(low) < max(high):
            margin = 0.05 * (max(high) - min(low))
            axes.set_ylim(min(low) - margin, max(high) + margin)
        axes.set(xlabel=label, ylabel="bits per byte", xlim=(0, None))
        axes.grid(alpha=0.3)
        if rows:
            axes.legend(title="model: test (line: train, points: valid)")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_atomically(folder / name, picture.getvalue())
