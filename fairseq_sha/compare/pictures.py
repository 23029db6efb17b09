"""Pictures of comparisons; each function raises ImportError without matplotlib."""

import io
import math
import statistics

from fairseq_sha.compare import trials
from fairseq_sha.compare.logs import mean
from fairseq_sha.files import write_atomically

SMOOTHING = 5  # points of a learning curve
WIDTH, HEIGHT, DPI = 8, 5, 120
# Colours that colour-blind readers can tell apart: Okabe and Ito's, and three of Paul Tol's.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
COLOURS += ["#882255", "#999933", "#7F7F7F"]
#: Markers and lines: one pair for each round of colours.
MARKERS = "osD^"
LINES = dict(zip(MARKERS, ("-", "--", "-.", ":")))

#: What is drawn of one comparison: the name of the file, and a caption.
PICTURES = {
    "bits_by_seconds.png": "Learning curves against seconds of training",
    "bits_by_bytes.png": "Learning curves against bytes seen",
    "best_of_k.png": "How much tuning a model needs: the expected best of k trials",
    "sensitivity.png": "All trials against each setting",
}
COMPUTE = "bits_by_compute.png"
COMPUTE_CAPTION = "Bits against compute, one line a model and recipe through all comparisons"


def draw(everything, rows, folder, prefix=""):
    """Draw all pictures of a comparison that its results have something for.

    Args:
        everything (dict): the content of results.json
        rows (list of dict): its summary
        folder (Path): where to
        prefix (str): of names of files

    Returns:
        names of files (without the prefix) that were written, a list
    """
    styles = styles_of(row["model"] for row in rows)
    figures = {
        "bits_by_seconds.png": curves(rows, styles, "training_seconds", "seconds of training"),
        "bits_by_bytes.png": curves(rows, styles, "bytes", "bytes seen"),
    }
    if everything.get("tuning"):
        models = everything["tuning"]["models"]
        styles = styles_of([*(row["model"] for row in rows), *models])
        figures["best_of_k.png"] = best_of_k(models, styles)
        figures["sensitivity.png"] = sensitivity(models, styles)
    written = [name for name, figure in figures.items() if figure is not None]
    for name in written:
        save(figures[name], folder / f"{prefix}{name}")
    return written


def save(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    write_atomically(path, picture.getvalue())


def new_figure(panels=1, columns=1):
    """A figure, and its axes in a list."""
    from matplotlib.figure import Figure

    lines = -(-panels // columns)
    size = (WIDTH, HEIGHT) if panels == 1 else (WIDTH * columns * 0.65, HEIGHT * lines * 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    for used in axes[:panels]:
        used.grid(alpha=0.3)
    return figure, axes[:panels]


def styles_of(models):
    """A colour and a marker for each model."""
    styles = {}
    for model in models:
        if model not in styles:
            row, column = divmod(len(styles), len(COLOURS))
            styles[model] = {"color": COLOURS[column], "marker": MARKERS[row % len(MARKERS)]}
    return styles


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


def by_device(runs):
    """Runs whose times may be drawn together, by what they ran on."""
    groups = {}
    for run in runs:
        machine = {**(run["machine"] or {}), "commit": None}
        groups.setdefault((run.get("device"), *sorted(map(str, machine.items()))), []).append(run)
    return list(groups.values())


def place(runs):
    """The name of the machine of some runs."""
    device = runs[0].get("device", "CPU")
    return (runs[0]["machine"] or {}).get("cpu") or "?" if device == "CPU" else device


def curves(rows, styles, axis, label):
    """Learning curves of all rows, in a panel for each machine if they show times."""
    everything = [run for row in rows for run in row["runs"]]
    groups = by_device(everything) if axis == "training_seconds" else [everything]
    figure, panels = new_figure(max(1, len(groups)), min(2, max(1, len(groups))))
    low, high = [], []
    for panel, group in zip(panels, groups):
        for row in rows:
            runs = [run for run in row["runs"] if run in group]
            if not runs:
                continue
            x, y = curve(runs, "train", axis)
            y = smooth(y)
            style = styles[row["model"]]
            score = f"{row['bits']:.3f}" if math.isfinite(row["bits"]) else "diverged"
            text = f"{row['model']}: {score}"
            line = {"color": style["color"], "linestyle": LINES[style["marker"]]}
            panel.plot(x, y, linewidth=1.2, label=text, **line)
            valid_x, valid_y = curve(runs, "valid", axis)
            panel.plot(valid_x, valid_y, linestyle="", markersize=4, **style)
            finite = [value for value in y + valid_y if math.isfinite(value)]
            if finite:
                low.append(min(finite))
                high.append(next(v for v in y[len(y) // 10 :] + finite if math.isfinite(v)))
        panel.set(xlabel=label, ylabel="bits per byte", xlim=(0, None))
        if len(groups) > 1:
            panel.set_title(place(group))
        if group:
            title = "model: test\n(line: train, points: valid)"
            small = {"fontsize": "small", "title_fontsize": "small"}
            panel.legend(title=title, loc="upper left", bbox_to_anchor=(1, 1), **small)
    # The first updates would compress the rest.
    if low and min(low) < max(high):
        margin = 0.05 * (max(high) - min(low))
        for panel in panels:
            panel.set_ylim(min(low) - margin, max(high) + margin)
    return figure


def compute(comparisons, labels):
    """Bits on test against seconds, training FLOPs and bytes, one line a model and recipe through
    all comparisons.

    Args:
        comparisons (list): of rows of each, and its rivals
        labels (dict): names of models and recipes, see ``summary.labels``

    Returns:
        a figure, None if no model and recipe is in two comparisons
    """
    points, rivals = {}, {}
    for rows, others in comparisons:
        for row in rows:
            if math.isfinite(row["bits"]):
                points.setdefault(labels[row["model"], row["recipe"]], []).append(row)
        for rival in others:
            primed = rival["primed_with"]
            rivals[rival["name"], primed > 0] = rival["bits"], primed  # the last: with all of train
    if all(len(found) < 2 for found in points.values()):
        return None
    styles = styles_of(points)
    everything = [run for found in points.values() for row in found for run in row["runs"]]
    # A machine on which no model has two budgets says nothing.
    groups = [
        group
        for group in by_device(everything)
        if any(
            sum(position(row, "seconds", group) is not None for row in found) > 1
            for found in points.values()
        )
    ]
    axes = [
        ("seconds of training" + (f", {place(g)}" if len(groups) > 1 else ""), "seconds", g)
        for g in groups
    ]
    if any(row["training_flops"] for found in points.values() for row in found):
        axes.append(("training FLOPs", "flops", everything))
    axes.append(("bytes seen", "bytes", everything))
    figure, panels = new_figure(len(axes), min(2, len(axes)))
    for panel, (label, kind, group) in zip(panels, axes):
        for model, found in points.items():
            places = [position(row, kind, group) for row in found]
            shown = [i for i, x in enumerate(places) if x is not None]
            shown.sort(key=places.__getitem__)
            line = [(places[i], found[i]) for i in shown]
            if not line:
                continue
            x, y = [x for x, _ in line], [row["bits"] for _, row in line]
            ends = [row["scores"][row["recipe"]]["interval"] for _, row in line]
            errors = [
                [0 if end is None else abs(bits - end[side]) for bits, end in zip(y, ends)]
                for side in (0, 1)
            ]
            panel.errorbar(
                x, y, errors, label=model, linewidth=1.2, markersize=5, capsize=2, **styles[model]
            )
        for (name, _), (bits, primed) in rivals.items():
            panel.axhline(bits, linestyle="--", linewidth=0.8, color="grey")
            text = f"{name}, {f'primed with {primed:,} bytes' if primed else 'alone'}"
            panel.text(
                *(0.01, bits, text),
                transform=panel.get_yaxis_transform(),
                fontsize="x-small",
                verticalalignment="center",
                zorder=1,  # below the lines of models
                bbox={"color": "white", "pad": 0.5},
            )
        panel.set(xlabel=label, ylabel="bits per byte, test", xscale="log", yscale="log")
        plain(panel.yaxis)
        if kind == "seconds":
            plain(panel.xaxis)
    legend = panels[-1].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, fontsize="small")
    return figure


def position(row, kind, group):
    """Where a row stands on an axis of compute; None if it has no such number."""
    if kind == "seconds":
        seconds = [run["training_seconds"] for run in row["runs"] if run in group]
        return mean(seconds) if seconds else None
    return row["training_flops"] if kind == "flops" else row["bytes"]


def plain(axis, ticks=None):
    """Have a logarithmic axis show plain numbers, at ``ticks`` if they are given."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def best_of_k(models, styles):
    """The expected best of k trials on valid against k; None if no trial finished."""
    scores = trials.scores(models)
    if not scores:
        return None
    figure, (axes,) = new_figure()
    for name, found in scores.items():
        counts = range(1, len(found) + 1)
        best = [trials.expected_best(found, count) for count in counts]
        axes.plot(counts, best, label=name, linewidth=1.2, markersize=4, **styles[name])
    axes.set(xlabel="number of trials", ylabel="expected best, bits per byte of valid")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return figure


def sensitivity(models, styles):
    """Bits of all trials against each setting; None if no trial finished. A cross at the upper
    edge is a trial that failed, a ring the chosen one, a square the paper's recipe."""
    scores = trials.scores(models)
    found = [trial for model in models.values() for trial in model["trials"]]
    settings = list(dict.fromkeys(key for trial in found for key in trial["settings"]))
    if not scores or not settings:
        return None
    figure, panels = new_figure(len(settings), min(2, len(settings)))
    for panel, setting in zip(panels, settings):
        values = [t["settings"][setting] for t in found if setting in t["settings"]]
        numeric = all(isinstance(value, (int, float)) for value in values)
        for name, model in models.items():
            own = [trial for trial in model["trials"] if setting in trial["settings"]]
            good = [trial for trial in own if not trials.is_failed(trial)]

            def where(some, numeric=numeric, setting=setting):
                x = [trial["settings"][setting] for trial in some]
                return x if numeric else list(map(str, x))

            colour = {"color": styles[name]["color"]}
            y = [trial["bits"] for trial in good]
            panel.plot(where(good), y, linestyle="", markersize=5, label=name, **styles[name])
            for number, marker in ((model.get("chosen"), "o"), (0, "s")):
                marked = [trial for trial in good if trial["trial"] == number]
                y = [trial["bits"] for trial in marked]
                panel.plot(where(marked), y, marker, markersize=11, fillstyle="none", **colour)
            failed = where([trial for trial in own if trials.is_failed(trial)])
            panel.plot(
                failed,
                [0.98] * len(failed),
                "x",
                transform=panel.get_xaxis_transform(),
                **colour,
            )
        panel.set(xlabel=setting, ylabel="bits per byte, valid")
        if numeric and is_logarithmic(values):
            panel.set_xscale("log")
        if numeric and len(set(values)) <= 6:
            plain(panel.xaxis, sorted(set(values)))
    handles, labels = panels[0].get_legend_handles_labels()
    title = "ring: chosen; square: paper's recipe; cross: failed"
    figure.legend(
        *(handles, labels), title=title, loc="outside lower center", ncols=5, fontsize="small"
    )
    return figure


def is_logarithmic(values):
    """Whether values look as if they were drawn evenly on a logarithmic scale: their median is
    closer to the geometric than to the arithmetic mean of both ends."""
    low, high = min(values), max(values)
    if low <= 0 or high < 8 * low:
        return False
    middle = math.log(statistics.median(values))
    return abs(middle - math.log(low * high) / 2) < abs(middle - math.log((low + high) / 2))
