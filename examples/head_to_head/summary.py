"""What a comparison found: results.json, a table, pictures."""

import json
import os

from logs import mean

SMOOTHING = 5  # points of a learning curve
PICTURES = {
    "bits_by_seconds.png": ("seconds", "seconds of training"),
    "bits_by_bytes.png": ("bytes", "bytes seen"),
}


def write(path, text):
    """Write a file that appears when it is complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path, content):
    write(path, json.dumps(content, indent=1) + "\n")


def summarise(results):
    """One entry a model, the best on test first: means over seeds and half the range of bits; of
    speed, time and memory over those seeds only that ran on the machine of the first.

    results: of finished runs, as ``run.py`` writes them
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
                "tokens": runs[0][split]["tokens"],
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
    # A diverged model has nan for a score and comes last.
    return sorted(rows, key=lambda row: (row["test"]["bits"] != row["test"]["bits"], score(row)))


def timed(runs):
    """Those runs of a model whose times can be put together: on the machine of the first."""
    return [run for run in runs if run["machine"] == runs[0]["machine"]]


def score(row):
    return row["test"]["bits"]


def table(rows, settings, missing):
    """The summary as Markdown; ``missing``: names of runs that are not finished."""

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
        f"The budget was {settings['budget']} of training. Seconds are updates times the median "
        "time of an update,",
        "without validation and checkpoints.",
    ]
    if any(len(row["seeds"]) > 1 for row in rows):
        seeds = ", ".join(f"{row['model']} {len(row['seeds'])}" for row in rows)
        lines += [f"Bits: mean over seeds ± half of their range (seeds: {seeds})."]
    counts = grouped(rows, lambda row: f"{row['test']['tokens']:,}")
    scored = "; ".join(f"{count} ({', '.join(names)})" for count, names in counts.items())
    lines += [
        f"Bytes of test that were scored: {scored}.",
        "Memory is that of the training process in main memory.",
        *(
            f"Speed, seconds and memory were measured on {cpu}: {', '.join(names)}."
            for cpu, names in grouped(rows, lambda row: (row["machine"] or {}).get("cpu")).items()
            if cpu is not None
        ),
    ]
    elsewhere = [row["model"] for row in rows if not row["all_timed"]]
    if elsewhere:
        lines += [
            "They are those of the first seed and others on its machine; another seed ran on "
            f"another, for as many updates: {', '.join(elsewhere)}."
        ]
    if missing:
        lines += [f"Not finished: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def grouped(rows, key):
    """Names of models by what ``key`` says of their rows."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row["model"])
    return groups


def curve(runs, split, axis):
    """A learning curve: positions on an axis and bits, both means over seeds."""
    seeds = [{point["update"]: point for point in run[split]} for run in runs]
    updates = sorted(set.intersection(*(set(points) for points in seeds)))
    across = [[points[update] for points in seeds] for update in updates]
    return (
        [mean(point[axis] for point in points) for points in across],
        [mean(point["bits"] for point in points) for points in across],
    )


def smooth(values):
    """Running mean over ``SMOOTHING`` points, fewer towards both ends."""
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
            runs = timed(runs) if axis == "seconds" else runs
            x, y = curve(runs, "train_curve", axis)
            y = smooth(y)
            text = f"{row['model']}: {row['test']['bits']:.3f}"
            (line,) = axes.plot(x, y, linewidth=1.2, label=text)
            valid_x, valid_y = curve(runs, "valid_curve", axis)
            axes.plot(valid_x, valid_y, "o", markersize=4, color=line.get_color())
            low += [min(y + valid_y)]
            high += [y[len(y) // 10]]  # the first updates would squash the rest
        if low and min(low) < max(high):
            margin = 0.05 * (max(high) - min(low))
            axes.set_ylim(min(low) - margin, max(high) + margin)
        axes.set(xlabel=label, ylabel="bits per byte", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(title="model: test (line: train, points: valid)")
        unfinished = folder / f"unfinished.{name}"
        figure.savefig(unfinished, dpi=120)
        os.replace(unfinished, folder / name)
