"""What it costs to reach a score: within one run, or between runs of several lengths."""

import math
from typing import Dict, List, NamedTuple

import numpy as np

from fairseq_sha.compare import intervals, pictures, summary

#: The columns: what a run took, as it is called in results.
KINDS = {
    "updates": "updates",
    "bytes seen": "bytes",
    "training FLOPs": "training_flops",
    "training, s": "training_seconds",
}

WITHIN = (
    "Costs to reach a score are read off the learning curve on valid of each run, between two "
    "validations linear in bits and in the logarithm of the cost. “≤”: the first validation has "
    "reached it already. If the learning rate falls towards the end of a run, its curve is no "
    "measure of what a shorter run with a schedule of its own would have cost; for that, compare "
    "budgets of several sizes and name all of their folders."
)
#: Bits by which the validation in training may differ from the evaluation.
SAME_VALIDATION = 0.02
BETWEEN = (
    "Costs to reach a score are read off whole runs of several lengths with the same seed, each "
    "with its own schedule: bits on valid at the end of each run, and between two of them linear "
    "in bits and in the logarithm of the cost. “≤”: the shortest run has reached it already. A "
    "seed of one length only is left out."
)


class Curve(NamedTuple):
    """Bits on valid against what they cost, of one seed."""

    seed: int
    costs: List[dict]  # by the keys of KINDS, of each point; a value may be None
    bits: List[float]


def within(runs):
    """The learning curves of some runs of a model."""
    return [
        Curve(
            run["seed"],
            [
                {
                    name: run.get(key) and run[key] * update / run["updates"]
                    for name, key in KINDS.items()
                }
                for update, _ in run["valid_curve"]
            ],
            [bits for _, bits in run["valid_curve"]],
        )
        for run in runs
    ]


def is_evaluated_alike(run):
    """Whether a learning curve tells how good a run's model is in evaluation, which may have
    longer segments or more context than the validation in training. A diverged one does."""
    if not run["valid_curve"]:
        return False
    last, evaluated = run["valid_curve"][-1][1], run["valid"]["bits"]
    return not math.isfinite(last - evaluated) or abs(last - evaluated) <= SAME_VALIDATION


def between(runs):
    """Curves through the ends of runs of one recipe, for each seed with runs of several budgets.

    Args:
        runs (list of tuple): budget and run
    """
    seeds = {}
    for budget, run in sorted(runs, key=lambda pair: pair[1]["updates"]):
        seeds.setdefault(run["seed"], {}).setdefault(budget, run)
    return [
        Curve(
            seed,
            [{name: run.get(key) for name, key in KINDS.items()} for run in lengths.values()],
            [run["valid"]["bits"] for run in lengths.values()],
        )
        for seed, lengths in seeds.items()
        if len(lengths) > 1
    ]


def reached(costs, bits, target):
    """The cost at which a curve first reaches a score.

    Args:
        costs (list of float): rising
        bits (list of float): at each of these costs; nan reaches nothing
        target (float): bits

    Returns:
        the cost, and whether it is only an upper bound; None if the curve does not reach it
    """
    for i, (cost, value) in enumerate(zip(costs, bits)):
        if value <= target:
            if i == 0 or not math.isfinite(bits[i - 1]):
                return cost, True
            share = (bits[i - 1] - target) / (bits[i - 1] - value)
            return costs[i - 1] * (cost / costs[i - 1]) ** share, False
    return None


class Cost(NamedTuple):
    """What a model needs to reach a score."""

    by_seed: Dict[int, float]  # of the seeds that reach it
    seeds: int  # in all
    bound: bool  # whether a value is only an upper bound

    @property
    def complete(self):
        """Whether all seeds reach it, and where is known."""
        return len(self.by_seed) == self.seeds and not self.bound

    @property
    def mean(self):
        """The geometric mean; inf if no seed reaches it."""
        logs = [math.log(value) for value in self.by_seed.values()]
        return math.exp(sum(logs) / len(logs)) if logs else math.inf


def cost(curves, kind, target):
    """The :class:`Cost` of a model, None if it is not known."""
    costs = [[point[kind] for point in curve.costs] for curve in curves]
    if any(None in of_seed for of_seed in costs):
        return None
    by_seed, bound = {}, False
    for of_seed, curve in zip(costs, curves):
        found = reached(of_seed, curve.bits, target)
        if found is not None:
            by_seed[curve.seed] = found[0]
            bound |= found[1]
    return Cost(by_seed, len(curves), bound)


def ratio(found, other):
    """The ratio of two :class:`Cost`, and its 95 % interval, for which models with the same seeds
    are paired, see :func:`intervals.draws`; None for the interval if either has only one seed."""
    value = found.mean / other.mean
    if min(len(found.by_seed), len(other.by_seed)) < 2:
        return value, None
    seeds, costs = zip(*(zip(*sorted(one.by_seed.items())) for one in (found, other)))
    drawn = intervals.draws([np.log(of_model)[:, None] for of_model in costs], 1, seeds=seeds)
    return value, tuple(np.exp(intervals.ends(drawn[0] - drawn[1])))


def report(models, target, reference, where):
    """A table of what each model needs to reach a score, the cheapest in updates first, and what
    must be known about it as sentences.

    Args:
        models (dict): the curves of each model, and its runs
        target (float): bits per byte on valid
        reference (str): the model to which others are compared
        where (str): :data:`WITHIN` or :data:`BETWEEN`
    """
    runs = [run for _, found in models.values() for run in found]
    kinds = list(KINDS)
    if len(pictures.by_device(runs)) > 1:
        kinds.remove("training, s")
    costs = {
        name: {kind: cost(curves, kind, target) for kind in kinds}
        for name, (curves, _) in models.items()
        if curves
    }
    rows = [
        [
            name,
            f"{len(costs[name]['updates'].by_seed)} of {costs[name]['updates'].seeds}",
            *(
                cell(costs[name][kind], costs.get(reference, {}).get(kind), name == reference, kind)
                for kind in kinds
            ),
        ]
        for name in sorted(costs, key=lambda name: costs[name]["updates"].mean)
    ]
    title = f"Cost to reach {target:g} bits per byte on valid"
    table = summary.Table(title, ["model", "seeds that reach it", *kinds], rows)
    notes = [
        where,
        "Costs are geometric means over the seeds that reach the score, which is too low where "
        "some do not.",
    ]
    if reference in costs:
        notes.append(
            f"In parentheses: the ratio to {reference}, with its 95 % interval from the spread "
            f"between seeds, paired where both models have the same ({summary.DAGGER}: one seed, "
            "no interval)."
        )
    if len(kinds) < len(KINDS):
        notes.append("Seconds to reach a score are left out, since runs are of several machines.")
    return table, notes


def cell(found, other, is_reference, kind):
    """A cost as text, with its ratio to the reference's."""
    if found is None:
        return "–"
    if not found.by_seed:
        return "not reached"
    text = summary.power(found.mean) if kind == "training FLOPs" else f"{found.mean:,.0f}"
    if found.bound:
        return f"≤ {text}"
    if is_reference or other is None or not (found.complete and other.complete):
        return text
    times, ends = ratio(found, other)
    shown = f"[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else summary.DAGGER
    return f"{text} ({times:.2f} {shown})"
