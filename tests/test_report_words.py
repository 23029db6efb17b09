"""The report of the demo of words."""

import re
import subprocess
import sys

import pytest

from fairseq_sha import commands
from tests.commands import REPOSITORY, command
from tests.options import SHA_RNN
from tests.tasks.test_words import write_words

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


@pytest.mark.long
def test_report_says_what_evaluation_found(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_words(data)
    options = f"{SHA_RNN} --cutoffs 3,6 --max-update 4 --save-dir {run}/checkpoints"
    options = re.sub("--criterion [a-z_]+", "", options)
    options += " --criterion cross_entropy_with_auxiliary_losses"
    options += f" --tensorboard-logdir {run}/tensorboard"
    done = command("fairseq-train", data, options, task="segment_language_modeling")
    assert done.returncode == 0, done.stdout
    argv = ["evaluate", data, "--path", run / "checkpoints" / "checkpoint_last.pt", "--cpu"]
    argv += ["--split", "test", "--json", run / "test.json"]
    assert commands.main([str(word) for word in argv]) == 0
    perplexity = float(re.search(r"([0-9.,]+) per word", capsys.readouterr().out)[1])

    script = REPOSITORY / "examples" / "enwiki6" / "report_words.py"
    argv = [sys.executable, script, "--data", data, "--run", run]
    done = subprocess.run([str(word) for word in argv], stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "on the 209 words and 30 ends of lines of test" in report
    assert f"| perplexity per word | {perplexity:.1f} |" in report
    assert "| words that are <unk> | 0 (0.0%) |" in report and "trained for 4 updates" in report
    assert "the 7 words that" in report and "    The history of " in report
    assert (run / "learning_curve.png").stat().st_size > 0
