"""The scripts of the page about the papers' claims run, and draw something."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from tests import random_checkpoint
from tests.commands import REPOSITORY

CLAIMS = REPOSITORY / "examples" / "claims"


@pytest.fixture(scope="module")
def draw():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw", CLAIMS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(folder, name, *options):
    """Run a benchmark at a tiny size; returns what it saved."""
    script, path = REPOSITORY / "benchmarks" / f"{name}.py", folder / f"{name}.json"
    words = [sys.executable, "-W", "ignore", script, "--repeats", 1, "--save", path, *options]
    done = subprocess.run(
        [str(word) for word in words], cwd=str(REPOSITORY), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path, json.loads(path.read_text()), done.stdout


def check_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")


def test_cells(draw, tmp_path):
    options = ["--lengths", 3, 9, "--streams", 2, "--width", 4]
    path, found, output = benchmark(tmp_path, "minimal_cells", *options)
    assert "GRU, Python loop" in output
    for row in found["layers"].values():
        assert len(row["ms"]) == len(row["MB"]) == 2 and min(row["ms"]) > 0
    draw.main(["cells", str(path), "--save", str(tmp_path / "cells.png")])
    check_picture(tmp_path / "cells.png")


def test_window(draw, tmp_path):
    options = ["--windows", 4, 16, 40, "--length", 8, "--streams", 2, "--width", 8]
    path, found, output = benchmark(tmp_path, "window", *options)
    assert [row["window"] for row in found["rows"]] == [0, 16, 40]  # 4 does not hold a segment
    carried = [row["carried MB"] * 2**20 for row in found["rows"]]
    assert carried == [0, 16 * 2 * 8 * 4, 40 * 2 * 8 * 4]
    assert "| no attention |" in output
    draw.main(["window", str(path), "--save", str(tmp_path / "window.png")])
    check_picture(tmp_path / "window.png")


def test_trust_ratios(draw, tmp_path):
    log = tmp_path / "sha_rnn" / "seed1" / "train.log"
    log.parent.mkdir(parents=True)
    line = {"epoch": 1, "num_updates": "5", "trust_min": "0.25", "trust_mean": "1"}
    log.write_text(f"started\n{json.dumps({**line, 'trust_max': '9'})}\n")
    draw.main(["trust", str(log), "--save", str(tmp_path / "trust.png")])
    check_picture(tmp_path / "trust.png")
    log.write_text("started\n")
    with pytest.raises(draw.UserError, match="no trust ratios"):
        draw.main(["trust", str(log), "--save", str(tmp_path / "none.png")])


def test_spans(draw, tmp_path):
    path = random_checkpoint.write(tmp_path / "model.pt", family="adaptive_span")
    checkpoint = torch.load(path, weights_only=False)
    paths = []
    for updates in (20, 10):
        checkpoint["optimizer_history"] = [{"num_updates": updates}]
        checkpoint["model"]["decoder.layers.1.attention.span"].fill_(updates / 100)
        paths.append(str(tmp_path / f"{updates}.pt"))
        torch.save(checkpoint, paths[-1])
    draw.main(["spans", *paths, "--save", str(tmp_path / "spans.png")])
    check_picture(tmp_path / "spans.png")
    figure = draw.spans(paths)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["layer 2"] == [[10, pytest.approx(10)], [20, pytest.approx(20)]]
