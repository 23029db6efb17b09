"""What it costs to reach a score: from learning curves, between runs of several lengths, and what
``fairseq-sha report --reach`` writes."""

import json
import math

import numpy as np
import pytest
from numpy.random import RandomState

from fairseq_sha.commands import main
from fairseq_sha.compare import cost, summary
from tests.compare.results import SLOW, cells_of, comparison, run


def test_between_two_points_bits_are_linear_in_the_logarithm_of_the_cost():
    costs, bits = [100, 400, 1600], [3.0, 2.5, 2.3]
    assert cost.reached(costs, bits, 2.75) == (pytest.approx(200), False)
    assert cost.reached(costs, bits, 2.5) == (400, False)
    assert cost.reached(costs, bits, 2.35) == (pytest.approx(400 * 4**0.75), False)
    assert cost.reached(costs, bits, 2.2) is None
    assert cost.reached(costs, bits, 3.0) == (100, True)  # or earlier


def test_the_first_time_counts_and_a_diverged_run_reaches_nothing():
    assert cost.reached([1, 2, 4, 8], [3.0, 2.0, 3.0, 1.0], 2.0) == (2, False)
    nan = float("nan")
    assert cost.reached([1, 2], [nan, nan], 9.0) is None
    assert cost.reached([1, 2], [nan, 2.0], 2.5) == (2, True)


def cost_of(values, first_seed=1):
    """A cost that all seeds reach."""
    by_seed = dict(enumerate(values, first_seed))
    return cost.Cost(by_seed, len(by_seed), bound=False)


def test_ratio_is_of_geometric_means_and_its_interval_covers():
    assert cost.ratio(cost_of([100, 400]), cost_of([50])) == (pytest.approx(4), None)
    # Simulated: the true ratio is 2, and both have a spread of a tenth.
    random = RandomState(1)
    for first_seed, most in ((1, 197), (4, 200)):  # the same seeds; others, which cover more
        covered, widths = 0, []
        for _ in range(200):
            first, second = np.exp(random.normal([[math.log(2)], [0]], 0.1, (2, 3)))
            _, (low, high) = cost.ratio(cost_of(first), cost_of(second, first_seed))
            covered += low < 2 < high
            widths.append(math.log(high / low))
        assert 185 <= covered <= most
        # Student's t has 4.3 standard errors for two degrees of freedom, and these are 0.08.
        assert 0.5 < np.median(widths) < 1.2


def test_ratio_pairs_models_by_seed():
    first, second = cost_of([200, 420, 810]), cost_of([100, 200, 400])
    _, (low, high) = cost.ratio(first, second)
    logs = np.log([200 / 100, 420 / 200, 810 / 400])
    error = 4.303 * logs.std(ddof=1) / np.sqrt(3)  # the paired t test, two degrees of freedom
    expected = np.exp([logs.mean() - error, logs.mean() + error])
    assert [low, high] == pytest.approx(expected, rel=0.01)
    in_another_order = first._replace(by_seed={3: 810, 1: 200, 2: 420})
    assert cost.ratio(in_another_order, second)[1] == pytest.approx((low, high))
    _, (low, high) = cost.ratio(first, cost_of([100, 200, 400], first_seed=4))
    assert low < 0.5 and high > 8


@pytest.fixture
def write(tmp_path):
    """Writes runs as a comparison; returns the folder."""

    def write(runs, name="out", budget=None):
        folder = tmp_path / name
        folder.mkdir()
        found = {**comparison(tuned=False, rivals=False), "runs": runs}
        found["settings"]["budget"] = budget or f"{runs[0]['updates']} updates"
        summary.write_results(folder / "results.json", found)
        return folder

    return write


def runs_of(speeds, seeds=(1, 2), updates=1000, **changes):
    """Runs whose bits on valid are ``4 - log2(speed * update / 100)``: by model, how fast it is."""
    made = []
    for model, speed in speeds.items():
        for seed in seeds:
            faster = speed * (1 + 0.01 * seed)
            curve = [
                [u, 4 - math.log2(faster * u / 100)]
                for u in (updates // 4, updates // 2, 3 * updates // 4, updates)
            ]
            found = run(model, seed, curve[-1][1], RandomState(seed), **changes)
            found.update(updates=updates, valid_curve=curve, bytes=2000 * updates)
            found["training_flops"] = 1e9 * updates
            found["training_seconds"] = 0.5 * updates
            found["valid"]["bits"] = curve[-1][1]
            made.append(found)
    return made


def report(tmp_path, *words):
    assert main(["report", *map(str, words), "--to", str(tmp_path / "page")]) == 0
    return (tmp_path / "page" / "report.md").read_text(encoding="utf-8")


def test_report_of_one_comparison_reads_learning_curves(write, tmp_path):
    folder = write(runs_of({"fast": 2, "slow": 1, "never": 0.1}))
    text = report(tmp_path, folder, "--reach", "1.5", "2", "--relative-to", "slow")
    table = cells_of(text, "Cost to reach 2 bits per byte on valid")
    assert list(table) == ["fast", "slow", "never"]
    # 2 bits after 400 / speed updates: 394 on average over seeds, and half of it.
    assert table["slow"]["updates"] == "394" and table["slow"]["seeds that reach it"] == "2 of 2"
    assert table["slow"]["bytes seen"] == "788,187" and table["slow"]["training, s"] == "197"
    assert table["slow"]["training FLOPs"] == "3.94e11"
    assert table["never"]["updates"] == "not reached"
    # The first validation, after 250 updates, is already better.
    assert table["fast"]["updates"] == "≤ 250"
    table = cells_of(text, "Cost to reach 1.5 bits per byte on valid")
    # Each seed is twice as fast, so that no spread remains.
    assert table["fast"]["updates"] == "279 (0.50 [0.50, 0.50])"
    assert "no measure of what a shorter run" in text


def test_report_of_several_lengths_reads_whole_runs(write, tmp_path):
    short = runs_of({"a": 1, "b": 2}, updates=250)
    long = runs_of({"a": 1, "b": 2}, updates=1000)
    for found in long:  # within a run the curve is worse, as with a high learning rate
        found["valid_curve"] = [[u, bits + 1] for u, bits in found["valid_curve"]]
    folders = [write(short, "short"), write(long, "long")]
    text = report(tmp_path, *folders, "--reach", "2", "1.2", "--relative-to", "b")
    joint = text.split("## short")[0]
    table = cells_of(joint, "Cost to reach 2 bits per byte on valid")
    assert table["a"]["updates"] == "394" and table["b"]["updates"] == "≤ 250"
    table = cells_of(joint, "Cost to reach 1.2 bits per byte on valid")
    assert table["a"]["updates"].startswith("686 (2.00 [")
    assert "whole runs of several lengths" in joint
    assert "Cost to reach" not in text.split("## short")[1]  # these curves would mislead
    other = write(runs_of({"c": 1, "d": 2}), "other", "900 updates")
    text = report(tmp_path, *folders, other, "--reach", "2", "1.2", "--relative-to", "b")
    assert list(cells_of(text.split("## other")[1], "Cost to reach 2 bits per byte on valid"))


def test_curves_of_models_with_another_evaluation_are_not_read(write, tmp_path):
    """They are no reference, even if they are the best."""
    runs = runs_of({"a": 1, "b": 1.5, "windows": 2})
    for found in runs[4:]:
        found["valid"]["bits"] -= 0.03
    text = report(tmp_path, write(runs), "--reach", "2")
    table = cells_of(text, "Cost to reach 2 bits per byte on valid")
    assert list(table) == ["b", "a"] and "(1.50 [" in table["a"]["updates"]
    assert "In parentheses: the ratio to b," in text
    assert "differs from the evaluation by more than 0.02 bits: windows." in text


def test_budgets_with_different_choices_are_not_lengths_of_one_recipe(write, tmp_path):
    folders = []
    for updates, chosen in ((250, 0), (1000, 1)):
        runs = [{**run, "recipe": "tuned"} for run in runs_of({"a": 1, "b": 2}, updates=updates)]
        folders.append(write(runs, str(updates)))
        path = folders[-1] / "results.json"
        found = json.loads(path.read_text())
        trials = [{"trial": i, "bits": 2.0, "settings": {"lr": 0.1 * i}} for i in range(2)]
        models = {"a": {"trials": trials, "chosen": chosen}, "b": {"trials": trials, "chosen": 1}}
        found["tuning"] = {"space": {}, "budget": "9 updates", "models": models}
        summary.write_results(path, found)
    joint = report(tmp_path, *folders, "--reach", "1.2").split("## 250")[0]
    assert list(cells_of(joint, "Cost to reach 1.2 bits per byte on valid")) == ["b"]
    assert "No cost, because the recipes chosen differ: a." in joint


def test_only_budgets_of_one_recipe_are_lengths(write, tmp_path):
    """A tuned recipe and the paper's are not, nor are two comparisons of one budget."""
    speeds = {"a": 1, "b": 2}
    short, long = runs_of(speeds, updates=250), runs_of(speeds, updates=1000)
    for found in long[:2]:
        found["recipe"] = "tuned"
    text = report(tmp_path, write(short, "short"), write(long, "long"), "--reach", "1.2")
    joint = text.split("## short")[0]
    assert list(cells_of(joint, "Cost to reach 1.2 bits per byte on valid")) == ["b"]

    again = write(runs_of(speeds, updates=253), "again", budget="250 updates")
    text = report(tmp_path, tmp_path / "short", again, "--reach", "1.2")
    assert "Cost to reach" not in text.split("## short")[0]


def test_a_model_with_both_recipes_is_compared_by_its_tuned_one(write, tmp_path):
    speeds = {"a": 1, "b": 2}
    tuned = [
        write(
            [{**run, "recipe": "tuned"} for run in runs_of(speeds, updates=updates)], str(updates)
        )
        for updates in (250, 1000)
    ]
    paper = write(runs_of({"a": 1}, updates=500), "paper")
    text = report(tmp_path, *tuned, paper, "--reach", "1.2", "--relative-to", "a")
    joint = text.split("## 250")[0]
    table = cells_of(joint, "Cost to reach 1.2 bits per byte on valid")
    assert table["a, tuned"]["updates"] == "686"
    assert table["b"]["updates"].startswith("343 (0.50 [")
    assert "the ratio to a, tuned, with its 95 % interval" in joint
    # Without tuned runs of several budgets, the given recipe is the reference.
    folders = tuned[0], paper, write(runs_of({"a": 1}), "longer")
    for words in ([], ["--relative-to", "a"]):
        text = report(tmp_path, *folders, "--reach", "1.2", *words).split("## 250")[0]
        table = cells_of(text, "Cost to reach 1.2 bits per byte on valid")
        assert list(table) == ["a, paper"] and "the ratio to a, paper" in text
    lines = joint.split("**Bits per byte, test**")[1].split("\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| a, paper", "| b", "| a, tuned"]


def test_costs_within_a_comparison_without_the_baseline_are_relative_to_its_best(write, tmp_path):
    folders = write(runs_of({"a": 1, "b": 2}), "one"), write(runs_of({"b": 2, "c": 3}), "two")
    text = report(tmp_path, *folders, "--reach", "1", "--relative-to", "a")
    table = cells_of(text.split("## two")[1], "Cost to reach 1 bits per byte on valid")
    assert "(1.50 [" in table["b"]["updates"] and "(" not in table["c"]["updates"]


def test_unknown_costs_are_not_made_up(write, tmp_path):
    runs = runs_of({"a": 1, "b": 2}, seeds=(1,))
    for found in runs[:1]:
        found["training_flops"] = None
        found["machine"] = SLOW
    text = report(tmp_path, write(runs), "--reach", "1.5")
    table = cells_of(text, "Cost to reach 1.5 bits per byte on valid")
    assert table["a"]["training FLOPs"] == "–" and "training, s" not in table["a"]
    assert table["a"]["updates"].endswith("(2.00 †)")
    assert "runs are of several machines" in text


def test_refusals(write, tmp_path, capsys):
    folder = str(write(runs_of({"a": 1})))
    to = ["--to", str(tmp_path / "page")]
    assert main(["report", folder, *to, "--reach", "2", "--relative-to", "x"]) == 1
    assert "--relative-to x: no such model; there are a" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
