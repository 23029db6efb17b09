"""Tables and pictures of made-up results."""

import pytest

from fairseq_sha.compare import pictures, summary
from tests.compare.results import FAST, SIZE, SLOW, comparison, run, with_text


def made_up(model, seed, test, points=((10, 4.0), (20, 3.0)), cpu="fast"):
    """A run as it was before bits of blocks were saved."""
    evaluation = {"bits": test, "tokens": 832, "tokens_per_second": 1000.0}
    curve = [list(point) for point in points]
    numbers = dict(parameters=5, updates=20, bytes=2000, peak_memory_mb=seed)
    numbers["training_seconds"] = 20.0 / seed
    return {
        **{"model": model, "seed": seed, "training_tokens_per_second": 500.0 * seed, **numbers},
        **{"valid": {**evaluation, "bits": test + 1}, "test": evaluation},
        **{"train_curve": curve, "valid_curve": curve[-1:], "machine": {"cpu": cpu}},
    }


def report(runs, **changes):
    """Tables and sentences about runs; the first table as a dict of its rows."""
    everything = {"settings": {"budget": "20 updates"}, "not_finished": [], "runs": runs}
    (first, *others), notes = summary.report({**everything, **changes})
    return {name: dict(zip(first.header[1:], cells)) for name, *cells in first.rows}, others, notes


def with_note(notes, start):
    """The one sentence that starts so."""
    (found,) = [note for note in notes if note.startswith(start)]
    return found


def test_results_without_blocks_have_no_intervals():
    runs = [made_up("a", 1, 2.5), made_up("b", 1, 2.0), made_up("b", 2, 2.2)]
    runs += [made_up("nan", 1, float("nan")), made_up("b", 3, 2.4), made_up("c", 1, 2.3)]
    rows, others, notes = report(runs)
    assert list(rows) == ["b", "c", "a", "nan"] and others == []
    assert list(rows["b"].items()) == [
        ("bits per byte, test", "2.200"),
        ("difference to the best model", "best"),
        ("parameters", "5"),
        ("bytes seen", "2,000"),
        ("tokens/s, training", "1,000"),
        ("tokens/s, evaluation", "1,000"),
        ("peak memory, MB", "3"),
        ("training, s", "12"),
    ]
    assert list(rows["c"].values())[:2] == ["2.300", "+0.100"]
    assert list(rows["nan"].values())[:2] == ["diverged", "–"]
    assert with_note(notes, "Bits are") == "Bits are means over seeds: 1, 2, 3 (b); 1 (c, a, nan)."
    assert with_note(notes, "No interval").endswith(": b, c, a, nan.")
    assert with_note(notes, "Ran on") == "Ran on fast."
    assert not any("Brackets" in note or "†" in note for note in notes)


def test_times_of_two_machines_are_not_put_together():
    runs = [made_up("a", 1, 2.0), made_up("a", 2, 3.0, cpu="slow"), made_up("b", 1, 2.6)]
    rows, times, notes = report(runs)
    assert not any("tokens/s" in column or ", s" in column for column in rows["a"])
    assert rows["a"]["bits per byte, test"] == "2.500"
    fast, slow = times
    assert fast.title == "Times on fast" and slow.title == "Times on slow"
    assert fast.rows == [["a", "500", "1,000", "1", "20"], ["b", "500", "1,000", "1", "20"]]
    assert slow.rows == [["a", "1,000", "1,000", "2", "10"]]
    assert "Ran on slow, with seeds: a (2)." in notes


def test_report_says_how_well_speeds_were_measured():
    runs = [{**made_up(model, 1, 2.0), "pace": pace} for model, pace in (("a", 1.04), ("b", 0.9))]
    runs.append(made_up("c", 1, 2.0))  # its speed was not measured before
    assert with_note(report(runs)[2], "Speeds within runs").endswith("0.90 (b) and 1.04 (a).")
    assert not any("Speeds within" in note for note in report(runs[2:])[2])


def test_report_says_which_speeds_were_not_measured_alone():
    runs = [{**made_up(model, 1, 2.0), "pace": pace} for model, pace in (("a", 1.0), ("b", None))]
    for found in runs:
        found["machine"]["runs at once"] = 2
    note = with_note(report(runs)[2], "Training speeds")
    assert "measured before, one model at a time, except those of b; evaluation" in note
    assert "one model at a time; evaluation" in with_note(report(runs[:1])[2], "Training speeds")
    del runs[1]["pace"]  # from before it was saved
    assert "one model at a time; evaluation" in with_note(report(runs)[2], "Training speeds")


def test_compressors_have_no_difference_to_a_model_that_diverged():
    rivals = [{"name": "xz", "primed_with": 0, "bits": 2.5, "seconds": 1.0, "version": "1"}]
    rows, *_ = report([made_up("a", 1, float("nan")), made_up("b", 1, float("nan"))], rivals=rivals)
    assert rows["xz, alone"]["bits per byte, test"] == "2.500"
    assert not any("nan" in cell for cell in rows["xz, alone"].values())


def test_learning_curves_of_two_machines_are_in_two_panels():
    pytest.importorskip("matplotlib")
    runs = [made_up("a", 1, 2.0), made_up("a", 2, 3.0, cpu="slow"), made_up("b", 1, 2.6)]
    rows = summary.summarise(runs)
    figure = pictures.curves(rows, pictures.styles_of("ab"), "bytes", "x")
    assert len(figure.axes) == 1
    figure = pictures.curves(rows, pictures.styles_of("ab"), "training_seconds", "x")
    assert [axes.get_title() for axes in figure.axes] == ["fast", "slow"]


def test_each_of_many_models_has_a_line_of_its_own():
    pytest.importorskip("matplotlib")
    names = [f"model{i}" for i in range(25)]
    rows = summary.summarise([made_up(name, 1, 2.0) for name in names])
    (axes,) = pictures.curves(rows, pictures.styles_of(names), "bytes", "x").axes
    lines = [line for line in axes.get_lines() if line.get_label().startswith("model")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)


def test_another_commit_is_named_and_is_no_other_machine():
    other = {**FAST, "commit": "def456"}
    random = Still()
    runs = [run("a", 1, 2.0, random), run("a", 2, 2.0, random, machine=other)]
    _, others, notes = report(runs)
    assert others == []
    assert [n.split(", with")[0].split(", ")[-1] for n in notes if n.startswith("Ran")] == [
        "commit abc123",
        "commit def456",
    ]


class Still:
    """Random numbers without randomness."""

    def normal(self, mean, spread, size=None):
        return mean


def test_tuned_models_and_compressors():
    found = comparison()
    rows, (tuning,), notes = report(**found)
    assert list(rows) == [
        "PPMd, order 16, primed with 5,480,772 bytes",
        *("sha_lstm", "sha_sru", "PPMd, order 16, alone", "sha_rnn", "adaptive_span"),
        *("xz -9e, alone", "transformer_xl", "min_gru"),
    ]
    paper, tuned, difference = (
        "bits per byte, test, paper's recipe",
        "tuned",
        "difference to the best model",
    )
    assert rows["sha_lstm"][difference] == "best"
    assert rows["sha_sru"][difference].startswith("not resolved [-0.0")
    assert rows["sha_sru"]["rank"] == rows["sha_lstm"]["rank"] == "1 to 2"
    assert rows["sha_rnn"]["rank"] == "3" and rows["min_gru"]["rank"] == "6"
    assert rows["sha_rnn"][difference].startswith("+0.07")
    for model in ("sha_lstm", "transformer_xl"):
        assert float(rows[model][paper].split()[0]) > float(rows[model][tuned].split()[0]) + 0.1
    assert rows["min_gru"][paper] == "–" and rows["min_gru"][tuned] == "diverged"
    assert rows["PPMd, order 16, primed with 5,480,772 bytes"][tuned] == "1.790"
    assert rows["PPMd, order 16, primed with 5,480,772 bytes"]["bytes seen"] == "5,480,772"
    assert rows["xz -9e, alone"]["training, s"] == "–"
    assert rows["sha_rnn"]["training FLOPs"] == "6.05e13"

    line = dict(zip(tuning.header, tuning.rows[0]))
    assert (line["trials"], line["failed"]) == ("8", "1")
    assert line["expected best of 8"] == line["best"] < line["expected best of 4"]
    assert line["chosen"].startswith("lr ")
    assert "Not finished, and so in no mean: min_gru seed 2." in notes
    assert with_note(notes, "Bytes of test") == "Bytes of test that were scored: 300,000."
    assert with_note(notes, "†").endswith(
        "since there is one seed of min_gru. Ranks do not cover it either."
    )
    assert with_note(notes, "Diverged") == "Diverged in at least one seed: min_gru."
    assert with_note(notes, "A compressor").endswith(
        "PPMd, order 16 (pyppmd 1.1.0): 1.2 s primed with 5,480,772 bytes, 1.2 s alone; "
        "xz -9e (lzma): 0.3 s alone."
    )


def test_intervals_of_one_seed_are_marked():
    rows, _, notes = report(**comparison(seeds=(1,), rivals=False))
    for cells in rows.values():
        for column in ("tuned", "difference to the best model"):
            assert ("[" in cells[column]) == cells[column].endswith("]†")
    assert "not what another seed would change" in with_note(notes, "†")
    assert not any("†" in note for note in report(**without_diverged(comparison()))[2])


def without_diverged(found):
    return {**found, "runs": [run for run in found["runs"] if run["model"] != "min_gru"]}


@pytest.mark.parametrize(
    "text, same",
    [
        ({"bytes": SIZE - 5000}, False),
        ({"bytes": SIZE - 3}, True),  # the first token, which is not scored, may be longer
        ({"sha256": "ab" * 32}, False),
        ({"sha256": None}, True),  # words
    ],
)
def test_models_of_another_text_are_not_compared(text, same):
    found = with_text(without_diverged(comparison(tuned=False)), "cd" * 32)
    for made in found["runs"]:
        if made["model"] == "sha_lstm":
            made["test"].update(text)
    rows, _, _ = report(found["runs"])
    if same:
        assert {rows["sha_lstm"]["rank"], rows["sha_sru"]["rank"]} == {"1 to 2"}
        return
    assert rows["sha_lstm"]["difference to the best model"] == "other text"
    assert rows["sha_lstm"]["rank"] == "–"
    assert rows["sha_sru"]["difference to the best model"] == "best"
    assert rows["sha_sru"]["rank"] == "1"


def test_what_has_no_hash_is_of_none_of_several_texts():
    found = with_text(without_diverged(comparison(tuned=False)), "cd" * 32)
    for made in found["runs"]:
        if made["model"] in ("sha_lstm", "adaptive_span"):
            made["test"]["sha256"] = {"sha_lstm": "ab" * 32}.get(made["model"])
    rows, _, _ = report(found["runs"])
    other = [name for name, row in rows.items() if row["rank"] == "–"]
    assert sorted(other) == ["adaptive_span", "sha_lstm"]


def test_written_files(tmp_path):
    pytest.importorskip("matplotlib")
    found = comparison()
    assert summary.write(tmp_path, found)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "table.md"),
        *pictures.PICTURES,
    }


def test_curves_are_means_over_seeds():
    runs = [made_up("a", 1, 2), made_up("a", 2, 2, ((10, 5.0), (20, 3.5), (30, 1.0)))]
    assert pictures.curve(runs, "train", "training_seconds") == ([7.5, 15], [4.5, 3.25])
    assert pictures.curve(runs, "valid", "bytes") == ([], [])  # no point in common
    assert pictures.smooth([0, 3, 6, 0, 30, 0]) == pytest.approx([0, 3, 7.8, 7.8, 10, 0])


def test_lines_through_budgets_leave_out_what_diverged():
    pytest.importorskip("matplotlib")
    found = [comparison(720), comparison(2880, seeds=(1,), shift=-0.2)]
    for other in found[1]["runs"]:
        if other["model"] == "sha_rnn":
            other["machine"] = SLOW
    comparisons = [(summary.summarise(f["runs"]), f["rivals"]) for f in found]
    labels = summary.labels(rows for rows, _ in comparisons)
    figure = pictures.compute(comparisons, labels)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        *("seconds of training", "training FLOPs", "bytes seen")
    ]
    for axes in figure.axes:
        names = [container.get_label() for container in axes.containers]
        assert "min_gru" not in names and len(names) == 5
        assert axes.get_xscale() == axes.get_yscale() == "log"
        texts = {text.get_text() for text in axes.texts}
        assert {"xz -9e, alone", "PPMd, order 16, primed with 5,480,772 bytes"} <= texts
    seconds = dict(zip(names, figure.axes[0].containers))
    assert list(seconds["sha_lstm"][0].get_xdata()) == [720, 2880]
    assert list(seconds["sha_rnn"][0].get_xdata()) == [720]  # the other time is of a slow machine
    assert pictures.compute(comparisons[:1], labels) is None


def test_a_tuned_recipe_and_the_papers_are_not_one_line():
    pytest.importorskip("matplotlib")
    found = [comparison(360), comparison(720), comparison(2880, tuned=False)]
    comparisons = [(summary.summarise(f["runs"]), f["rivals"]) for f in found]
    figure = pictures.compute(comparisons, summary.labels(rows for rows, _ in comparisons))
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    assert len(lines) == 2 * 5
    assert list(lines["sha_rnn, tuned"].get_xdata()) == [360, 720]
    assert list(lines["sha_rnn, paper"].get_xdata()) == [2880]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.1, 0.3, 1.0, 3.0, 10.0], True),
        ([0.05, 0.3, 0.5, 0.7, 1.0], False),
        ([0.0, 0.1, 1.0], False),
        ([8, 8, 16], False),
    ],
)
def test_scale_of_a_setting(values, expected):
    assert pictures.is_logarithmic(values) == expected
