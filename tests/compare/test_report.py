"""``fairseq-sha report``: what it writes, and what it refuses."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fairseq_sha.commands import main
from fairseq_sha.compare import intervals, summary
from tests.compare.results import BLOCK, FAST, MODELS, SIZE, SLOW, cells_of, comparison, with_text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two comparisons of one name, with two budgets."""
    made = []
    for seconds, shift in ((720, 0.0), (2880, -0.2)):
        folder = tmp_path_factory.mktemp(f"budget{seconds}") / "out"
        folder.mkdir()
        found = comparison(seconds, shift=shift)
        summary.write_results(folder / "results.json", found)
        made.append(folder)
    return made


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects cells and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.cells = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "code"):
            self.cells.append(data)


def test_page_holds_all_of_it(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "page"
    assert main(["report", *map(str, folders), "--to", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'index.html'}\n"
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.links) == 1 + 4 + 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "<script" not in text and "prefers-color-scheme: dark" in text
    report = (out / "report.md").read_text(encoding="utf-8")
    for picture in re.findall(r"\]\((.*?)\)", report):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert report.count("](") == len(page.links)
    for folder in folders:
        assert f"## {folder}\n" in report and str(folder) in text  # both are called out
    for seconds in (720, 2880):
        command = comparison(seconds)["command"]
        assert command in report and command in page.cells
    for words in ("torch 2.13.0", "commit abc123", "OMP_NUM_THREADS=1"):
        assert words in report and words in text
    # The same numbers in both.
    cells = re.findall(r"(?<=\| )[^|\n]+(?= \|)", report)
    assert [cell for cell in cells if cell != "---"] == [
        cell for cell in page.cells if not cell.startswith("fairseq-sha")
    ]


def test_works_without_matplotlib(folders, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from fairseq_sha.commands import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not {'torch', 'fairseq'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folders[0]), "--to", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'fairseq-sha[plots]'" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "report.md"}
    assert "not resolved" in (tmp_path / "index.html").read_text(encoding="utf-8")


def blocks_of(found, model):
    """Bits of each seed and block of a model's tuned runs."""
    runs = [run for run in found["runs"] if (run["model"], run.get("recipe")) == (model, "tuned")]
    return [run["test"]["block_bits"] for run in runs]


def is_difference(cell, found, model, other, reference):
    """Whether a cell has the difference of two models; random numbers may be drawn otherwise."""
    both = [np.array(bits) for bits in (blocks_of(found, model), blocks_of(other, reference))]
    values = intervals.draws(both, SIZE, BLOCK, seeds=[(1, 2, 3)] * 2)
    expected = (both[0] - both[1]).mean(0).sum() / SIZE, *intervals.ends(values[0] - values[1])
    numbers = [float(number) for number in re.findall(r"[+-]\d\.\d+", cell)]
    return "resolved" not in cell and numbers == pytest.approx(expected, abs=0.003)


def test_any_model_can_be_the_reference(folders, tmp_path):
    found = comparison()
    assert main(["report", str(folders[0]), "--to", str(tmp_path), "--relative-to", "sha_rnn"]) == 0
    rows = cells_of((tmp_path / "report.md").read_text(encoding="utf-8"))
    column = {model: cells["difference to sha_rnn"] for model, cells in rows.items()}
    assert column["sha_rnn"] == "–"
    for model in ("sha_lstm", "sha_sru", "adaptive_span", "transformer_xl"):
        assert is_difference(column[model], found, model, found, "sha_rnn"), column[model]
    bits = float(rows["sha_rnn"]["tuned"].split()[0])
    assert column["xz -9e, alone"] == f"{2.481 - bits:+.3f}"
    # The order and the ranks are still by bits.
    assert list(rows)[1] == "sha_lstm" and rows["sha_rnn"]["rank"] == "3"


def test_models_of_comparisons_with_one_budget_are_in_one_table(folders, tmp_path):
    found, other = comparison(), comparison(shift=0.3)
    for run in other["runs"]:
        run["model"] = {"sha_rnn": "changed"}.get(run["model"], run["model"])
    (tmp_path / "other").mkdir()
    summary.write_results(tmp_path / "other" / "results.json", other)
    three = [*folders, tmp_path / "other"]
    page = tmp_path / "page"
    assert main(["report", *map(str, three), "--to", str(page), "--relative-to", "sha_rnn"]) == 0
    text = (page / "report.md").read_text(encoding="utf-8")
    assert text.count("**All models, ") == 1  # not one of the budget that one comparison has
    rows = cells_of(text, "All models, 720 seconds")
    assert {model.split(" (")[0] for model in rows} == {*MODELS, "changed", "min_gru"}
    assert len(rows) == 2 + 2 * 5  # models of one name are told apart
    cell = rows["changed"]["difference to sha_rnn"]
    assert is_difference(cell, other, "changed", found, "sha_rnn"), cell
    assert "training, s" not in rows["changed"]
    assert main(["report", *map(str, three), "--to", str(page), "--relative-to", "sha_lstm"]) == 0
    rows = cells_of((page / "report.md").read_text(encoding="utf-8"), "All models, 720 seconds")
    first, second = f"sha_lstm ({folders[0]})", "sha_lstm (other)"
    assert rows[first][f"difference to {first}"] == "–"
    cell = rows[second][f"difference to {first}"]
    assert is_difference(cell, other, "sha_lstm", found, "sha_lstm"), cell
    # With one budget, bits by budget would say the same once more.
    one_budget = [str(folders[0]), str(tmp_path / "other")]
    assert main(["report", *one_budget, "--to", str(page)]) == 0
    assert "**Bits per byte, test**" in text
    assert "**Bits per byte, test**" not in (page / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "budget, machine, together",
    [
        ("720 seconds", SLOW, False),
        ("720 seconds", {**FAST, "commit": "def456"}, True),  # another commit, the same machine
        ("1,440 updates", SLOW, True),
    ],
)
def test_seconds_of_two_machines_are_in_no_table_together(tmp_path, budget, machine, together):
    for name, place in (("a", FAST), ("b", machine)):
        found = comparison(rivals=False)
        found["settings"]["budget"] = budget
        found["runs"] = [{**run, "machine": place} for run in found["runs"]]
        (tmp_path / name).mkdir()
        summary.write_results(tmp_path / name / "results.json", found)
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "page")]
    assert main(["report", *words]) == 0
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert (f"All models, {budget}" in text) == together
    assert ("with the same seconds on different machines" in text) != together
    if not together:
        row = cells_of(text, "Bits per byte, test")["sha_rnn"]
        assert list(row)[1:] == [f"{name} ({budget})" for name in "ab"]


def refused(capsys, *words):
    assert main(["report", *map(str, words)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refusals(folders, tmp_path, capsys):
    to = ["--to", tmp_path / "page"]
    assert "results.json is missing; name a folder" in refused(capsys, tmp_path, *to)
    for content in ("{", "[]", '{"runs": []}'):
        (tmp_path / "results.json").write_text(content)
        assert "has no results of fairseq-sha compare" in refused(capsys, tmp_path, *to)
    summary.write_results(tmp_path / "results.json", {**comparison(), "runs": []})
    assert "has no finished run" in refused(capsys, tmp_path, *to)
    other = comparison(tuned=False)
    for run in other["runs"]:
        run["test"]["bytes"] -= 5000
    summary.write_results(tmp_path / "results.json", other)
    error = refused(capsys, folders[0], tmp_path, *to)
    assert "different test data, 300,000 and 295,000 bytes" in error
    for folder, sha256 in (folders[0], "ab" * 32), (tmp_path, "cd" * 32):
        summary.write_results(folder / "results.json", with_text(comparison(tuned=False), sha256))
    error = refused(capsys, folders[0], tmp_path, *to)
    assert "300,000 (SHA-256 of test: abababababab…) and 300,000 (SHA-256 of test: cd" in error
    old = tmp_path / "old"
    old.mkdir()
    summary.write_results(old / "results.json", comparison(tuned=False))
    assert "different test data, 300,000 and 300,000" in refused(
        capsys, old, folders[0], tmp_path, *to
    )
    assert not (tmp_path / "page").exists()
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, folders[0], "--to", tmp_path / "file")
