"""The results of a comparison: results.json, tables, pictures.

A run is a dict: ``model``, ``seed``, ``parameters``, ``updates``, ``bytes`` (that it was trained
on), ``training_seconds``, ``training_tokens_per_second``, ``pace`` (its own speed, as a share of
the one that was measured before; optional), ``training_flops`` (optional), ``peak_memory_mb``,
``device``, ``machine``; for ``valid`` and ``test`` a dict of ``bits`` (per byte), ``tokens`` and
``tokens_per_second``, and from ``fairseq-sha evaluate`` also ``bytes``, ``policy``, ``block_bits``
and others; ``train_curve`` and ``valid_curve``, lists of ``[update, bits]``; and in a comparison
with tuning its ``recipe``, ``"paper"`` or ``"tuned"``.
"""

import json
import math
from typing import List, NamedTuple

import numpy as np

from fairseq_sha.compare import intervals, pictures, trials
from fairseq_sha.compare.logs import mean
from fairseq_sha.files import write_atomically

# Bytes of test may differ by this share: some tasks do not score the first symbol.
SAME_TEXT = 0.001
# A bootstrap of fewer blocks covers far less than it says.
MIN_BLOCKS = 10
DAGGER = "†"  # marks intervals without the spread between seeds


class Table(NamedTuple):
    """Cells as text."""

    title: str
    header: List[str]
    rows: List[List[str]]


def write(folder, everything):
    """Write results.json, table.md and pictures; returns whether pictures could be drawn.

    Args:
        folder (Path): of the comparison
        everything (dict): ``command``, ``settings``, ``not_finished`` (names of runs), ``runs``,
            and optionally ``tuning`` and ``rivals``
    """
    write_results(folder / "results.json", everything)
    tables, notes = report(everything)
    write_atomically(folder / "table.md", markdown(tables, notes))
    try:
        pictures.draw(everything, summarise(everything["runs"]), folder)
    except ImportError:
        return False
    return True


def write_results(path, everything):
    """Write all results of a comparison as JSON, one line per run."""
    head = [
        f"{json.dumps(key)}: {compact(everything[key])}," for key in everything if key != "runs"
    ]
    runs = ",\n".join(map(compact, everything["runs"]))
    write_atomically(path, "{\n" + "\n".join(head) + f'\n"runs": [\n{runs}\n]\n}}\n')


def compact(content):
    """JSON on one line."""
    return json.dumps(content, ensure_ascii=False)


def summarise(runs, reference=None):
    """One row per model, the best on test first, diverged models last.

    A row's own numbers are those of the tuned recipe if there is one, otherwise of the paper's.
    ``scores`` has both: bits (means over seeds) and their interval, None without bits of blocks.
    ``difference`` to the reference is a value and its interval, which is None if it is unknown; it
    is None for the reference, and for models that scored other text. ``one_seed`` tells whether
    that interval lacks the spread between seeds. ``rank`` may be None.

    Args:
        runs (list of dict): that are finished
        reference (str): the model to which others are compared (default: the best)
    """
    models = {}
    for run in runs:
        recipes = models.setdefault(run["model"], {})
        recipes.setdefault(run.get("recipe", "paper"), []).append(run)
    rows = []
    for name, recipes in models.items():
        recipe = "tuned" if "tuned" in recipes else "paper"
        chosen = sorted(recipes[recipe], key=lambda run: run["seed"])
        flops = [run.get("training_flops") for run in chosen]
        row = {
            "model": name,
            "recipe": recipe,
            "runs": chosen,
            "bits": mean(run["test"]["bits"] for run in chosen),
            "scores": {key: score(found) for key, found in recipes.items()},
            "parameters": chosen[0]["parameters"],
            "training_flops": None if None in flops else mean(flops),
            "bytes": mean(run["bytes"] for run in chosen),
            "test_bytes": test_bytes(chosen[0]),
            "test_sha256": chosen[0]["test"].get("sha256"),
        }
        rows.append(row)
    rows.sort(key=lambda row: by_bits(row["bits"]))
    compare_rows(rows, reference)
    return rows


def score(runs):
    """The mean over seeds on test, and its interval if the bits of blocks are known."""
    bits = blocks(runs)
    return {
        "seeds": sorted(run["seed"] for run in runs),
        "bits": mean(run["test"]["bits"] for run in runs),
        "blocks": len(runs[0]["test"].get("block_bits") or []),
        "interval": None
        if bits is None
        else intervals.interval(
            bits, test_bytes(runs[0]), block_bytes=runs[0]["test"].get("block_bytes")
        )[1:],
    }


def blocks(runs):
    """Bits of each seed and block of test; None if they are not known, or too few to be drawn
    from."""
    bits = [run["test"].get("block_bits") for run in runs]
    if None in bits or len({len(seed) for seed in bits}) > 1 or len(bits[0]) < MIN_BLOCKS:
        return None
    return np.array(bits, float)


def test_bytes(run):
    # fairseq-eval-lm does not say; it reads bytes as tokens.
    return run["test"].get("bytes", run["test"]["tokens"])


def by_bits(bits):
    """A key for sorting that puts nan last."""
    return bits != bits, bits


def compare_rows(rows, reference=None):
    """Add ``reference``, ``difference`` and ``rank`` to sorted rows: among those that scored the
    same text as the reference, or as most of them did."""
    same = max(
        (group for group in by_text(rows) if reference in [None, *(row["model"] for row in group)]),
        key=len,
        default=[],
    )
    first = next((row for row in same if reference in (None, row["model"])), None)
    for row in rows:
        row.update(reference=row is first, difference=None, rank=None)
    for row in same:
        if row is not first:
            row["difference"] = (row["bits"] - first["bits"], None)
    with_blocks = [
        (row, bits) for row in same for bits in [blocks(row["runs"])] if bits is not None
    ]
    if not with_blocks:
        return
    shape = with_blocks[0][1].shape[1]
    drawn = [(row, bits) for row, bits in with_blocks if bits.shape[1] == shape]
    block_bytes = drawn[0][0]["runs"][0]["test"].get("block_bytes")
    values = intervals.draws(
        [bits for _, bits in drawn],
        drawn[0][0]["test_bytes"],
        block_bytes,
        seeds=[tuple(run["seed"] for run in row["runs"]) for row, _ in drawn],
    )
    if len(drawn) == len(same) > 1:  # otherwise a rank among some of the models would mislead
        for (row, _), *rank in zip(drawn, *intervals.rank_ends(values)):
            row["rank"] = tuple(map(int, rank))
    of_first = [value for (row, _), value in zip(drawn, values) if row is first]
    for (row, _), value in zip(drawn, values):
        if of_first and row is not first:
            row["one_seed"] = 1 in (len(row["runs"]), len(first["runs"]))
            ends = intervals.ends(value - of_first[0])
            row["difference"] = (row["bits"] - first["bits"], tuple(map(float, ends)))


def labels(comparisons):
    """A name for each model and recipe in the rows of several comparisons: that of the model,
    followed by the recipe if its rows are of both recipes."""
    pairs = list(
        dict.fromkeys((row["model"], row["recipe"]) for rows in comparisons for row in rows)
    )
    models = [model for model, _ in pairs]
    return {
        (model, recipe): model if models.count(model) == 1 else f"{model}, {recipe}"
        for model, recipe in pairs
    }


def reference_row(rows):
    """The row to which others are compared."""
    return next(row for row in rows if row["reference"])


def by_text(rows):
    """Lists of rows whose models have scored the same text: by how many bytes they have scored, and
    by its hash. What has no hash may have scored any of the texts, and is only taken for the same
    as others that have one if all of these have scored one text."""
    hashes = {row["test_sha256"] for row in rows} - {None}
    groups = []
    for row in rows:
        for group in groups:
            sizes = group[0]["test_bytes"], row["test_bytes"]
            same_hash = len(hashes) < 2 or group[0]["test_sha256"] == row["test_sha256"]
            if same_hash and abs(sizes[0] - sizes[1]) <= SAME_TEXT * max(sizes):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def scored(row):
    """How many bytes of test a model has scored, and of which text if that is known."""
    sha256 = row["test_sha256"]
    return f"{row['test_bytes']:,}" + (f" (SHA-256 of test: {sha256[:12]}…)" if sha256 else "")


def report(everything, reference=None):
    """The tables of a comparison, and what must be known about them as sentences.

    Args:
        everything (dict): the content of results.json
        reference (str): the model to which others are compared (default: the best)
    """
    rows = summarise(everything["runs"], reference)
    rivals, tuning = everything.get("rivals") or [], everything.get("tuning")
    machines = by_machine(rows)
    tables = [main_table(rows, rivals, machines, reference)]
    if len(machines) > 1:
        tables += [
            Table(f"Times on {name}", ["model", *TIMES], [[m, *times(r)] for m, r in runs.items()])
            for name, runs in machines.items()
        ]
    if tuning:
        tables.append(tuning_table(tuning))
    return tables, [
        *about_bits(rows, rivals),
        *about_evaluation(rows),
        *about_training(everything, machines),
        *(about_tuning(tuning) if tuning else []),
        *about_rivals(rivals),
        *(
            [f"Not finished, and so in no mean: {', '.join(everything['not_finished'])}."]
            if everything["not_finished"]
            else []
        ),
    ]


def main_table(rows, rivals, machines, reference=None, title=""):
    """Models and compressors, the best first. Times are columns if all are of one machine."""
    to_reference = f"difference to {reference or 'the best model'}"
    tuned = any("tuned" in row["scores"] for row in rows)
    columns = {
        "model": lambda row: row["model"],
        "bits per byte, test, paper's recipe": lambda row: bits(row["scores"].get("paper")),
        "tuned": lambda row: bits(row["scores"].get("tuned")),
        to_reference: lambda row: difference(row, "–" if reference else "best"),
        "rank": lambda row: rank(row["rank"]),
        "answers right": lambda row: answers(row["runs"]),
        "parameters": lambda row: f"{row['parameters']:,}",
        "training FLOPs": lambda row: power(row["training_flops"]),
        "bytes seen": lambda row: f"{row['bytes']:,.0f}",
    }
    if not tuned:
        paper = columns.pop("bits per byte, test, paper's recipe")
        del columns["tuned"]
        columns = {"model": columns.pop("model"), "bits per byte, test": paper, **columns}
    lines = [(row["bits"], [cell(row) for cell in columns.values()]) for row in rows]
    header = list(columns)
    if len(machines) == 1:
        (runs,) = machines.values()
        header += TIMES
        for row, (_, cells) in zip(rows, lines):
            cells += times(runs[row["model"]])
    for rival in rivals:
        cells = dict.fromkeys(header, "–")
        cells["model"] = rival_name(rival)
        cells["tuned" if tuned else "bits per byte, test"] = f"{rival['bits']:.3f}"
        if rows and math.isfinite(reference_row(rows)["bits"]):
            cells[to_reference] = f"{rival['bits'] - reference_row(rows)['bits']:+.3f}"
        cells["bytes seen"] = f"{rival['primed_with']:,}"
        lines.append((rival["bits"], list(cells.values())))
    lines.sort(key=lambda line: by_bits(line[0]))
    content = [cells for _, cells in lines]
    # Columns that say nothing are left out.
    kept = [
        i
        for i in range(len(header))
        if not content or any(line[i] not in ("–", "best") for line in content)
    ]
    return Table(title, [header[i] for i in kept], [[line[i] for i in kept] for line in content])


TIMES = ["tokens/s, training", "tokens/s, evaluation", "peak memory, MB", "training, s"]


def times(runs):
    """Cells of the columns ``TIMES``: means over a model's runs on one machine."""
    peaks = [run["peak_memory_mb"] for run in runs if run["peak_memory_mb"] is not None]
    return [
        f"{mean(run['training_tokens_per_second'] for run in runs):,.0f}",
        f"{mean(run['test']['tokens_per_second'] for run in runs):,.0f}",
        f"{max(peaks):,}" if peaks else "–",
        f"{mean(run['training_seconds'] for run in runs):,.0f}",
    ]


def by_machine(rows):
    """Runs of each model on each machine: a dict of dicts of lists. Two commits of this package on
    the same machine, with the same versions of everything else, are one."""
    machines = {}
    for row in rows:
        for run in row["runs"]:
            models = machines.setdefault(describe(run, commit=False), {})
            models.setdefault(row["model"], []).append(run)
    return machines


def describe(run, commit=True):
    """A run's machine and versions in words."""
    machine = dict(run.get("machine") or {})
    known = [machine.pop("cpu", None) or "unknown machine"]
    if run.get("device", "CPU") != "CPU":
        known.insert(0, run["device"])
    cpus, threads = machine.pop("cpus", None), machine.pop("omp_num_threads", None)
    if cpus is not None:
        known.append(f"{cpus} core{'s' if cpus != 1 else ''}")
    if threads is not None:
        known.append(f"OMP_NUM_THREADS={threads}")
    named = {"python": "Python"}
    found = machine.pop("commit", None)
    known += [f"{named.get(key, key)} {value}" for key, value in machine.items() if value]
    if commit and found:
        known.append(f"commit {found}")
    return ", ".join(known)


def bits(found):
    """A score and its interval as text."""
    if found is None:
        return "–"
    if found["bits"] != found["bits"]:
        return "diverged"
    if found["interval"] is None:
        return f"{found['bits']:.3f}"
    low, high = found["interval"]
    return f"{found['bits']:.3f} [{low:.3f}, {high:.3f}]{DAGGER * (len(found['seeds']) == 1)}"


def difference(row, of_reference="best"):
    """A row's difference to the reference as text."""
    if row["reference"]:
        return of_reference
    if row["difference"] is None:
        return "other text"
    value, ends = row["difference"]
    if value != value:
        return "–"
    if ends is None:
        return f"{value:+.3f}"
    low, high = ends
    shown = f"[{low:+.3f}, {high:+.3f}]{DAGGER * row['one_seed']}"
    return f"{value:+.3f} {shown}" if low > 0 or high < 0 else f"not resolved {shown}"


def rank(ends):
    """The interval of a rank as text."""
    if ends is None:
        return "–"
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def answers(runs):
    """The mean share of answers that greedy prediction gets right, as text."""
    found = [run["test"].get("answers") for run in runs]
    if None in found:
        return "–"
    return f"{mean(of['correct'] / of['tokens'] for of in found):.1%}"


def power(number):
    """A large number with three digits, such as 1.23e15."""
    return "–" if number is None else f"{number:.2e}".replace("e+", "e")


def rival_name(rival):
    return f"{rival['name']}, {primed(rival)}"


def primed(rival):
    """What a compressor has read before, as text."""
    read = rival["primed_with"]
    return f"primed with {read:,} bytes" if read else "alone"


def about_bits(rows, rivals):
    """Sentences about scores, differences and ranks."""
    scores = [(row["model"], found) for row in rows for found in row["scores"].values()]
    known = [found for _, found in scores if found["interval"] is not None]
    notes = []
    if scores:
        seeds = grouped((", ".join(map(str, found["seeds"])), model) for model, found in scores)
        notes.append(f"Bits are means over seeds: {with_models(seeds)}.")
    if known:
        sizes = {row["runs"][0]["test"].get("block_bytes") for row in rows} - {None}
        size = f" of {min(sizes):,} bytes" if len(sizes) == 1 else ""
        notes.append(
            f"Brackets are 95 % intervals: blocks{size} of test are drawn by bootstrap, means over "
            "seeds from Student's t distribution."
        )
    if any(row["difference"] and row["difference"][1] for row in rows):
        notes.append(
            "“Not resolved”: the interval of the difference contains zero. Both models are scored "
            "on the same blocks, and paired by seed if they have the same seeds; otherwise the "
            "interval covers more than 95 %. Each interval is for its difference alone, not "
            "adjusted for the number of them."
        )
    if any(row["rank"] for row in rows):
        notes.append("Ranks are 95 % intervals from the same draws, compressors left out.")
    single = names(m for m, s in scores if s["interval"] is not None and len(s["seeds"]) == 1)
    if single:
        of = "" if single == names(model for model, _ in scores) else f" of {single}"
        notes.append(
            f"{DAGGER} covers blocks of text only, not what another seed would change, since there "
            f"is one seed{of}. Ranks do not cover it either."
        )
    without = [(model, found) for model, found in scores if found["interval"] is None]
    unsaved = names(model for model, found in without if not found["blocks"])
    if unsaved:
        notes.append(f"No interval, because bits of blocks were not saved: {unsaved}.")
    few = names(model for model, found in without if found["blocks"])
    if few:
        notes.append(f"No interval, because the text has fewer than {MIN_BLOCKS} blocks: {few}.")
    diverged = names(model for model, found in scores if found["bits"] != found["bits"])
    if diverged:
        notes.append(f"Diverged in at least one seed: {diverged}.")
    if any("tuned" in row["scores"] for row in rows):
        paper = names(row["model"] for row in rows if row["recipe"] == "paper")
        notes.append(
            "Differences, ranks, bytes and times are those of the tuned recipes"
            + (f", and of the paper's recipe of {paper}." if paper else ".")
        )
    if rivals:
        notes.append("Compressors have no interval.")
    return notes


def about_evaluation(rows):
    counts = grouped((scored(row), row["model"]) for row in rows)
    policies = grouped((row["runs"][0]["test"].get("policy"), row["model"]) for row in rows)
    return [
        *([f"Bytes of test that were scored: {with_models(counts)}."] if rows else []),
        *(
            f"Evaluated with {policy}" + ("." if len(policies) == 1 else f": {', '.join(models)}.")
            for policy, models in policies.items()
            if policy is not None
        ),
    ]


def about_training(everything, machines):
    """Sentences about budget, times and machines."""
    notes = [
        f"The budget was {everything['settings']['budget']} of training. Seconds are the number of "
        "updates times the time of an update, without validation and checkpoints: the median of "
        "the run, or of a short run before.",
        "Memory is the main memory of the training process.",
    ]
    beside = [run for run in everything["runs"] if (run.get("machine") or {}).get("runs at once")]
    if beside:
        # Results of before paces were saved do not tell.
        alone = [run for run in beside if run.get("pace", True)]
        names = {run["model"] for run in beside} - {run["model"] for run in alone}
        but = f", except those of {', '.join(sorted(names))}" if names else ""
        notes.append(
            f"Training speeds and seconds were measured before, one model at a time{but}; "
            "evaluation speeds were measured while other models ran."
        )
    paces = [run for run in everything["runs"] if run.get("pace")]
    if paces:
        slow, fast = (choose(paces, key=lambda run: run["pace"]) for choose in (min, max))
        notes.append(
            "Speeds within runs, as a share of those measured before, were between "
            f"{slow['pace']:.2f} ({slow['model']}) and {fast['pace']:.2f} ({fast['model']})."
        )
    seeds = {}
    for run in everything["runs"]:
        name = " ".join([run["model"], *([run["recipe"]] if "recipe" in run else [])])
        seeds.setdefault(describe(run), {}).setdefault(name, []).append(str(run["seed"]))
    ran = {
        machine: [f"{name} ({', '.join(found)})" for name, found in models.items()]
        for machine, models in seeds.items()
    }
    everywhere = len(ran) == 1
    notes += [
        f"Ran on {name}" + ("." if everywhere else f", with seeds: {', '.join(runs)}.")
        for name, runs in ran.items()
    ]
    if len(machines) > 1:
        notes.append("Times of each machine are in a table of their own.")
    return notes


def tuning_table(tuning):
    """One row per model: its trials on valid, and what was chosen."""
    scores = trials.scores(tuning["models"])
    longest = max(map(len, scores.values()), default=0)
    counts = [count for count in (1, 4, 16, 64) if count < longest] + [longest] * bool(longest)
    header = ["model", "trials", "failed", "paper's recipe", "best", "chosen"]
    header += [f"expected best of {count}" for count in counts]
    rows = []
    for name, model in tuning["models"].items():
        found = model["trials"]
        by_number = {trial["trial"]: trial for trial in found}
        chosen = by_number.get(model.get("chosen"))
        cells = [name, str(len(found)), str(sum(map(trials.is_failed, found)))]
        cells += [trial_bits(by_number.get(0)), trial_bits(chosen)]
        cells.append(setting_names(chosen["settings"]) if chosen else "–")
        own = scores.get(name, [])
        cells += [
            f"{trials.expected_best(own, count):.3f}" if count <= len(own) else "–"
            for count in counts
        ]
        rows.append(cells)
    return Table("Tuning: bits per byte on valid", header, rows)


def trial_bits(trial):
    if trial is None:
        return "–"
    return "failed" if trials.is_failed(trial) else f"{trial['bits']:.3f}"


def setting_names(settings):
    """Settings of a trial as text."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    )


def about_tuning(tuning):
    notes = [
        f"Tuning: {tuning['budget']} for each trial. The first trial of each model is the paper's "
        "recipe. The choice is by valid only. The expected best of k trials is by the "
        "estimator of Tang et al. (arXiv 2004.13705), over all trials, as if they were drawn at "
        "random; a failed trial counts like the worst of any model."
    ]
    border = [
        f"{name} ({', '.join(model['on_border'])})"
        for name, model in tuning["models"].items()
        if model.get("on_border")
    ]
    if border:
        notes.append(f"Chosen on the border of the space: {', '.join(border)}.")
    ran = grouped(
        (describe(trial), f"{name} {trial['trial']}")
        for name, model in tuning["models"].items()
        for trial in model["trials"]
        if trial.get("machine")
    )
    notes += [
        f"Trials ran on {machine}" + ("." if len(ran) == 1 else f": {', '.join(found)}.")
        for machine, found in ran.items()
    ]
    return notes


def about_rivals(rivals):
    """Versions and times of compressors; their seconds are no times of training."""
    if not rivals:
        return []
    seconds = grouped(
        (f"{rival['name']} ({rival['version']})", f"{rival['seconds']:,.3g} s {primed(rival)}")
        for rival in rivals
    )
    found = "; ".join(f"{name}: {', '.join(each)}" for name, each in seconds.items())
    return [
        "A compressor that is primed with train is charged for test only: the compressed size of "
        f"both less that of train. {found}."
    ]


def names(models):
    """Names without repetition, as text."""
    return ", ".join(dict.fromkeys(models))


def grouped(pairs):
    """Values by key, each once, in the order in which they come."""
    groups = {}
    for key, value in pairs:
        found = groups.setdefault(key, [])
        if value not in found:
            found.append(value)
    return groups


def with_models(groups):
    """What models have in common as text: with their names, unless it is the same for all."""
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{what} ({', '.join(models)})" for what, models in groups.items())


def markdown(tables, notes):
    """Tables and sentences as Markdown."""
    parts = []
    for table in tables:
        lines = [f"**{table.title}**", ""] if table.title else []
        lines += [f"| {' | '.join(table.header)} |", "| --- " * len(table.header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        parts.append("\n".join(lines))
    parts.append("\n".join(f"* {note}" for note in notes))
    return "\n\n".join(parts) + "\n"
