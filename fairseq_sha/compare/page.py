"""The report of one or several comparisons: report.md, pictures, and index.html, which needs no
other file."""

import base64
import html
import json
from typing import List, NamedTuple, Tuple

from fairseq_sha.compare import cost, pictures, summary
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #fff; --line: #d0d0d0; --soft: #f3f3f3 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --back: #16181c; --line: #42454c; --soft: #24272d }
}
body { color: var(--text); background: var(--back); font: 16px/1.5 system-ui, sans-serif;
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h2 { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: bottom }
thead th { white-space: normal; min-width: 4.5rem; background: var(--soft) }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--back) }
tbody th { white-space: normal; min-width: 8rem }
thead th:first-child { background: var(--soft) }
caption { text-align: left; font-weight: bold; padding: 0.5rem 0 }
figure { margin: 1.5rem 0 } figcaption { font-size: 0.9rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
code { background: var(--soft); padding: 0.1rem 0.3rem; overflow-wrap: anywhere }
li { overflow-wrap: anywhere }
"""


class Section(NamedTuple):
    """A part of the report."""

    title: str
    command: str  # empty: none
    tables: List[summary.Table]
    pictures: List[Tuple[str, str]]  # names of files and captions
    notes: List[str]


def write(folders, destination, reach=(), relative_to=None):
    """Write the report.

    Args:
        folders (list of Path): of comparisons
        destination (Path): a folder, which is made if it is missing
        reach (list of float): bits per byte on valid; what it costs to reach them is reported
        relative_to (str): the model to which others are compared, in comparisons that have it
            (default: the best on test)

    Returns:
        whether pictures could be drawn

    Raises:
        UserError: a folder has no results, they are not of the same test text, or there is no
            model ``relative_to``
    """
    comparisons = {name: read(folder) for name, folder in zip(titles(folders), folders)}
    references = {
        name: relative_to if relative_to in (run["model"] for run in found["runs"]) else None
        for name, found in comparisons.items()
    }
    check_reference(comparisons, relative_to)
    rows = {
        name: summary.summarise(found["runs"], references[name])
        for name, found in comparisons.items()
    }
    check_same_text(rows)
    labels = summary.labels(rows.values())
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--to {destination}: is a file; name a folder")
    drawn, joint_drawn, complete = {}, [], True
    try:
        for number, (name, found) in enumerate(comparisons.items(), 1):
            prefix = f"{number}_" if len(comparisons) > 1 else ""
            written = pictures.draw(found, rows[name], destination, prefix)
            drawn[name] = [(f"{prefix}{file}", pictures.PICTURES[file]) for file in written]
        figure = pictures.compute(
            [(rows[name], found.get("rivals") or []) for name, found in comparisons.items()],
            labels,
        )
        if figure is not None:
            pictures.save(figure, destination / pictures.COMPUTE)
            joint_drawn.append((pictures.COMPUTE, pictures.COMPUTE_CAPTION))
    except ImportError:
        drawn, complete = {}, False
    sections, joint_costs = [], set()
    if len(comparisons) > 1:
        equal = of_equal_budgets(comparisons)
        joint = [joint_table(comparisons, rows, labels)] if len(equal) > 1 else []
        joint += tables_of_budgets(comparisons, equal, relative_to)
        about = ["Intervals, machines, versions and commands are given with each comparison below."]
        if len({budget for budget, _ in equal}) < len(equal):
            about.append(
                "Comparisons with the same seconds on different machines are in no table together, "
                "since a model is trained for a different number of updates on each."
            )
        costs, notes, joint_costs = costs_between(comparisons, rows, labels, reach, relative_to)
        sections.append(
            Section("All comparisons", "", [*joint, *costs], joint_drawn, [*about, *notes])
        )
    for name, found in comparisons.items():
        tables, notes = summary.report(found, references[name])
        # Costs between comparisons are a better measure.
        others = [
            row for row in rows[name] if labels[row["model"], row["recipe"]] not in joint_costs
        ]
        costs, about_costs = costs_within(others, reach, references[name])
        tables, notes = [*tables, *costs], [*notes, *about_costs]
        command = found.get("command", "")
        sections.append(Section(name, command, tables, drawn.get(name, []), notes))
    title = "Comparison of language models"
    write_atomically(destination / "report.md", as_markdown(title, sections))
    write_atomically(destination / "index.html", as_html(title, sections, destination))
    return complete


def titles(folders):
    """A name for each folder: its last part, or all of its path if that is not enough."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders)]


def read(folder):
    """The results of a comparison; UserError."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; name a folder that fairseq-sha compare has written")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"settings", "not_finished", "runs"} <= set(found):
        raise UserError(f"{path} has no results of fairseq-sha compare; run the comparison again")
    if not found["runs"]:
        raise UserError(f"{path} has no finished run; repeat the command of the comparison")
    return found


def check_same_text(rows):
    """UserError if the best models of comparisons were scored on different text."""
    best = {name: summary.reference_row(found) for name, found in rows.items()}
    groups = summary.by_text(best.values())
    if len(groups) > 1:
        (first, row), (second, other) = (
            next((name, row) for name, row in best.items() if row is group[0])
            for group in groups[:2]
        )
        raise UserError(
            f"{first} and {second} have scored different test data, {summary.scored(row)} and "
            f"{summary.scored(other)} bytes; make a report of each"
        )


def joint_table(comparisons, rows, labels):
    """Bits of each model and recipe in each comparison; the order is that of the last one that has
    it."""
    models = {}
    for name, found in reversed(list(rows.items())):
        for row in found:
            for recipe, score in row["scores"].items():
                if (row["model"], recipe) in labels:
                    cells = models.setdefault(labels[row["model"], recipe], {})
                    cells[name] = summary.bits(score)
    header = [f"{name} ({found['settings']['budget']})" for name, found in comparisons.items()]
    lines = [[model, *(cells.get(name, "–") for name in rows)] for model, cells in models.items()]
    return summary.Table("Bits per byte, test", ["model", *header], lines)


def of_equal_budgets(comparisons):
    """Names of comparisons with the same budget, by the budget and the machines that they ran on.
    Machines count for seconds only: other budgets are the same on all of them."""
    equal = {}
    for name, found in comparisons.items():
        budget, machines = found["settings"]["budget"], None
        if budget.endswith(" seconds"):
            machines = frozenset(summary.describe(run, commit=False) for run in found["runs"])
        equal.setdefault((budget, machines), []).append(name)
    return equal


def tables_of_budgets(comparisons, equal, relative_to):
    """All models of the comparisons that have one budget in one table, for each such budget, see
    :func:`of_equal_budgets`. Where several have the model ``relative_to``, that of the first is
    meant."""
    tables = []
    for (budget, _), members in equal.items():
        if len(members) == 1:
            continue
        by_name = {name: comparisons[name]["runs"] for name in members}
        models = [model for runs in by_name.values() for model in {run["model"] for run in runs}]
        pooled = [
            {**run, "model": f"{run['model']} ({name})"} if models.count(run["model"]) > 1 else run
            for name, runs in by_name.items()
            for run in runs
        ]
        meant = relative_to, *(f"{relative_to} ({name})" for name in by_name)
        reference = next((run["model"] for run in pooled if run["model"] in meant), None)
        rows = summary.summarise(pooled, reference)
        tables.append(summary.main_table(rows, [], {}, reference, f"All models, {budget}"))
    return tables


def check_reference(comparisons, model):
    """UserError if no comparison has the model to which others are compared."""
    known = sorted({run["model"] for found in comparisons.values() for run in found["runs"]})
    if model is not None and model not in known:
        raise UserError(f"--relative-to {model}: no such model; there are {', '.join(known)}")


def costs_within(rows, reach, reference):
    """Tables of what it costs to reach scores within each run of a comparison, and sentences."""
    if not reach:
        return [], []
    models, other = {}, []
    for row in rows:
        if all(map(cost.is_evaluated_alike, row["runs"])):
            models[row["model"]] = cost.within(row["runs"]), row["runs"]
        else:
            other.append(row["model"])
    tables, notes = costs_of(models, reach, reference or next(iter(models), None), cost.WITHIN)
    if other:
        notes = [
            *notes,
            "No cost, because training has no validation, or one that differs from the evaluation "
            f"by more than {cost.SAME_VALIDATION} bits: {', '.join(other)}.",
        ]
    return tables, notes


def costs_between(comparisons, rows, labels, reach, reference):
    """The same between the runs of several comparisons, and the labels of the models that have
    such costs. The paper's recipe of a model and a tuned one are not lengths of one recipe, nor are
    two tuned ones that differ."""
    runs, recipes = {}, {}
    for name, found in comparisons.items():
        for row in rows[name]:
            label = labels[row["model"], row["recipe"]]
            of_recipe = runs.setdefault(label, [])
            of_recipe += [(found["settings"]["budget"], run) for run in row["runs"]]
            recipes.setdefault(label, []).append(chosen_settings(found, row))
    several = [name for name, found in recipes.items() if any(one != found[0] for one in found)]
    models = {
        name: ([] if name in several else cost.between(found), [run for _, run in found])
        for name, found in runs.items()
    }
    if reference is None:
        names = [labels[row["model"], row["recipe"]] for row in [*rows.values()][-1]]
    else:
        names = [labels[reference, r] for r in ("tuned", "paper") if (reference, r) in labels]
    reference = next((name for name in names if models[name][0]), names[0])
    tables, notes = costs_of(models, reach, reference, cost.BETWEEN)
    if reach and several:
        notes = [*notes, f"No cost, because the recipes chosen differ: {', '.join(several)}."]
    return tables, notes, {name for name, (curves, _) in models.items() if curves}


def chosen_settings(comparison, row):
    """What tuning chose for a row's model; None if it is not known, or the recipe was given."""
    if row["recipe"] != "tuned":
        return None
    model = comparison.get("tuning", {}).get("models", {}).get(row["model"], {})
    return next(
        (t["settings"] for t in model.get("trials", []) if t["trial"] == model.get("chosen")), None
    )


def costs_of(models, reach, reference, where):
    """A table for each score; the sentences hold for all of them."""
    found = [cost.report(models, target, reference, where) for target in reach]
    tables = [table for table, _ in found if table.rows]
    return tables, found[0][1] if tables else []


def as_markdown(title, sections):
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.command:
            parts.append(f"```\n{section.command}\n```\n")
        parts.append(summary.markdown(section.tables, section.notes))
        parts += [f"{caption}:\n\n![{caption}]({name})\n" for name, caption in section.pictures]
    return "\n".join(parts)


def as_html(title, sections, folder):
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.command:
            parts.append(f"<p><code>{html.escape(section.command)}</code></p>")
        parts += map(table_as_html, section.tables)
        notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in section.notes)
        parts.append(f"<ul>\n{notes}\n</ul>")
        for name, caption in section.pictures:
            data = base64.b64encode((folder / name).read_bytes()).decode()
            text = html.escape(caption)
            parts.append(
                f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table_as_html(table):
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    lines = []
    for name, *cells in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide" tabindex="0"><table>{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
