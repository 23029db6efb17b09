"""Draws the pictures of this page that no command of fairseq-sha draws.

    python examples/claims/draw.py window runs/window.json --save window.png
    python examples/claims/draw.py cells runs/minimal_cells.json --save minimal_cells.png
    python examples/claims/draw.py trust OUT/*/seed1/train.log --save trust.png
    python examples/claims/draw.py spans runs/spans/checkpoint_1_*.pt --save spans.png

window and cells are what benchmarks/window.py and benchmarks/minimal_cells.py save, trust is logs
of trainings with optimizer.log_trust_ratios, spans is checkpoints of one Adaptive Span.
"""

import argparse
import json
from pathlib import Path

from fairseq_sha.compare.pictures import COLOURS, MARKERS, new_figure, plain, save
from fairseq_sha.errors import UserError


def window(paths):
    """Time and memory of a step against the attention window."""
    found = json.loads(paths[0].read_text())
    none, *rows = found["rows"]
    figure, panels = new_figure(2, 2)
    windows = [row["window"] for row in rows]
    for panel, unit, title in zip(panels, ("ms", "MB"), ("processor time, ms", "memory, MB")):
        for i, kind in enumerate(("training", "evaluation")):
            name, colour = f"{kind} {unit}", COLOURS[i]
            values = [row[name] for row in rows]
            panel.plot(windows, values, "o-", color=colour, label=kind)
            panel.axhline(
                none[name], color=colour, linestyle=":", label=f"{kind} without attention"
            )
        panel.set(xlabel="window, tokens", ylabel=title, xscale="log", ylim=(0, None))
        plain(panel.xaxis, windows)
        panel.tick_params(axis="x", rotation=45)
        panel.legend(fontsize="small")
    figure.suptitle(found["machine"], fontsize="small")
    return figure


def cells(paths):
    """Time and memory of a step of each layer against the length, as ratios to minGRU."""
    found = json.loads(paths[0].read_text())
    lengths = found["options"]["lengths"]
    figure, panels = new_figure(2, 2)
    for panel, unit, title in zip(panels, ("ms", "MB"), ("time", "memory")):
        least = found["layers"]["minGRU"][unit]
        for i, (name, row) in enumerate(found["layers"].items()):
            ratios = [value / of for value, of in zip(row[unit], least)]
            style = {"color": COLOURS[i], "marker": MARKERS[i % len(MARKERS)]}
            panel.plot(lengths, ratios, label=name, **style)
        panel.set(xlabel="tokens", ylabel=f"{title} / minGRU", xscale="log", ylim=(0, None))
        plain(panel.xaxis, lengths)
        panel.legend(fontsize="small")
    figure.suptitle(found["machine"], fontsize="small")
    return figure


def trust(paths):
    """Smallest, mean and largest trust ratio of all tensors against updates, a panel for each
    log."""
    figure, panels = new_figure(len(paths), min(2, len(paths)))
    for panel, path in zip(panels, paths):
        lines = [json.loads(x) for x in path.read_text().splitlines() if x.startswith('{"epoch"')]
        lines = [line for line in lines if "trust_mean" in line]
        if not lines:
            raise UserError(f"{path}: no trust ratios; train with optimizer.log_trust_ratios=true")
        updates = [int(line["num_updates"]) for line in lines]
        for colour, name in zip(COLOURS, ("trust_max", "trust_mean", "trust_min")):
            panel.plot(updates, [float(line[name]) for line in lines], color=colour, label=name)
        panel.set(xlabel="updates", ylabel="trust ratio", yscale="log")
        panel.set_title(path.parent.parent.name, fontsize="small")
        panel.legend(fontsize="small")
    return figure


def spans(paths):
    """The span of each head in tokens against updates, a colour for each layer."""
    import torch

    points = []
    for path in paths:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        weights, longest = checkpoint["model"], checkpoint["cfg"]["model"]["attn_span"]
        names = [name for name in weights if name.endswith("attention.span")]
        updates = checkpoint["optimizer_history"][-1]["num_updates"]
        points.append((updates, [(weights[name] * longest).tolist() for name in names]))
    points.sort(key=lambda point: point[0])
    figure, (panel,) = new_figure()
    for layer, heads in enumerate(points[0][1]):
        for head in range(len(heads)):
            lengths = [of_layers[layer][head] for _, of_layers in points]
            label = f"layer {layer + 1}" if head == 0 else None
            updates = [update for update, _ in points]
            panel.plot(updates, lengths, ".-", color=COLOURS[layer % len(COLOURS)], label=label)
    panel.set(xlabel="updates", ylabel="span of a head, tokens", ylim=(0, None))
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {function.__name__: function for function in (window, cells, trust, spans)}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--save", required=True, type=Path)
    args = parser.parse_args(argv)
    save(kinds[args.kind](args.paths), args.save)


if __name__ == "__main__":
    main()
