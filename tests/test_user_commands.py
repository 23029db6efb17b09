"""``fairseq-sha``: what a terminal, a pipe and a mistake do to it."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.commands import COMMANDS, main
from fairseq_sha.commands.common import model_overrides
from fairseq_sha.commands.evaluate import BLOCK, bits_of_blocks
from tests.commands import REPOSITORY, command
from tests.options import SHA_RNN
from tests.tiny_corpus import text, write_folder


def fairseq_sha(*argv, environment=None, **kwargs):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fairseq_sha", *argv],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        capture_output=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), test=833)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = command("fairseq-train", data, f"{SHA_RNN} --max-update 30 --save-dir {folder}")
    assert done.returncode == 0, done.stdout
    return str(folder / "checkpoint_last.pt")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_waits_for_nothing(name):
    code = (
        "import sys\n"
        "from fairseq_sha.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert not {'torch', 'fairseq', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *([name] if name else []), "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = list(COMMANDS) if not name else [f"fairseq-sha {name}"]
    assert all(word in done.stdout for word in expected)


@pytest.mark.parametrize(
    "words", [["generate", "--length", "5"], ["score", "--cpu", "--per-line", "{file}"]]
)
def test_reader_that_has_seen_enough_ends_the_command_quietly(path, tmp_path, words):
    (tmp_path / "text").write_bytes(text(300))
    words = [word.format(file=tmp_path / "text") for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", "fairseq_sha", *words, "--path", path],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert process.returncode == 141


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_text_that_the_terminal_cannot_show_is_escaped(path, tmp_path, encoding):
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(name, "wb") as file:
        file.write(b"abc\nde")
    done = fairseq_sha(
        *["score", "--path", path, "--cpu", "--per-line", name],
        environment={"PYTHONIOENCODING": encoding},
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0].endswith("\tabc") and "caf\\udce9: " in lines[2]


def test_file_errors_are_one_line_unless_the_traceback_is_wanted(path):
    words = ["score", "--path", path, "--cpu", "/none/there"]
    done = fairseq_sha(*words, cwd=REPOSITORY)
    assert done.returncode == 1
    assert done.stderr.decode() == "error: /none/there: No such file or directory\n"
    done = fairseq_sha(*words, cwd=REPOSITORY, environment={"FAIRSEQ_SHA_TRACEBACK": "1"})
    assert done.returncode == 1 and b"Traceback" in done.stderr


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full"
)
def test_full_disk_is_one_line(path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fairseq_sha", "generate", "--path", path, "--length", "5"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == "error: No space left on device"


@pytest.mark.parametrize("options", [[], ["--batch-size", "3", "--tokens-per-sample", "7"]])
def test_evaluate_agrees_with_fairseq(data, path, tmp_path, capsys, options):
    words = ["evaluate", data, "--path", path, "--cpu", *options]
    assert main([*words, "--json", str(tmp_path / "score.json")]) == 0
    out = capsys.readouterr().out
    score = json.loads((tmp_path / "score.json").read_text())
    eval_lm = command(
        "fairseq-eval-lm",
        data,
        f"--path {path} --cpu --gen-subset test {' '.join(options) or '--tokens-per-sample 40'}",
    )
    bits = float(re.search(r"Loss \(base 2\): ([0-9.]+)", eval_lm.stdout).group(1))
    assert score["tokens"] == score["bytes"] == 832
    assert score["bits_per_byte"] == pytest.approx(bits, abs=2e-4)
    assert f"{score['bits_per_byte']:.4f} bits per byte" in out and "832 tokens, 832 bytes" in out
    assert sum(score["block_bits"]) == pytest.approx(832 * score["bits_per_byte"], abs=0.01)
    assert os.listdir(tmp_path) == ["score.json"]


def test_evaluate_with_a_fitted_temperature_reports_it_apart(data, path, tmp_path, capsys):
    words = ["evaluate", data, "--path", path, "--cpu", "--json"]
    assert main([*words, str(tmp_path / "plain.json")]) == 0
    expected = capsys.readouterr().out
    fitted_words = [*words, str(tmp_path / "fitted.json"), "--fit-temperature", "valid"]
    assert main(fitted_words) == 0
    plain, fitted = capsys.readouterr().out.splitlines()
    assert f"{plain}\n" == expected
    before, after = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "fitted")
    )
    assert before["fitted_temperature"] is None
    assert after["bits_per_byte"] == before["bits_per_byte"]
    found = after["fitted_temperature"]
    assert found["split"] == "valid" and found["bits_per_byte"] != after["bits_per_byte"]
    assert fitted.startswith(f"test, logits times {found['factor']:.2f}")
    assert f"{found['bits_per_byte']:.4f} bits per byte" in fitted and "fitted on valid" in fitted


def test_blocks_are_stretches_of_text():
    np = pytest.importorskip("numpy")
    sizes = np.array([BLOCK - 1, 1, 1, BLOCK])
    bits = bits_of_blocks(np.log(2) * np.array([1.0, 2.0, 4.0, 8.0]), sizes)
    assert bits == [3.0, 4.0, 8.0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--context-window", "5"], "--context-window has no use here"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--context-window", "40"], "--context-window 40: leaves nothing to score"),
        (["--split", "other"], "{data}/other.idx: no such file"),
        (["--fit-temperature", "other"], "{data}/other.idx: no such file"),
        (["--fit-temperature", "test"], "--fit-temperature test: a temperature fitted on"),
        (["--split", "valid", "--fit-temperature", "test"], "--fit-temperature test: a"),
        (["--split", "valid", "--fit-temperature", "valid"], "--fit-temperature valid: a"),
        (["--model-overrides", "window"], "--model-overrides window: not a dict"),
        (["--model-overrides", "{'windows': 3}"], "--model-overrides windows: the model has no"),
        (["--user-dir", "/none"], "--user-dir /none: no such folder"),
    ],
)
def test_mistakes_are_one_line(data, path, capsys, words, message):
    assert main(["evaluate", data, "--path", path, "--cpu", *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: " + message.format(data=data))


def test_overrides_act(data, path, capsys):
    scores = []
    for window in (60, 5):
        words = ["evaluate", data, "--path", path, "--cpu"]
        assert main([*words, "--model-overrides", f"{{'window': {window}}}"]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] != scores[1]
    assert model_overrides("{'a': 1}") == {"a": 1}
    with pytest.raises(UserError, match="not a dict"):
        model_overrides("{1: 2}")


PLUGIN = """
from dataclasses import dataclass
from fairseq.models import register_model
from fairseq_sha.models.sha_rnn import SHARNN, SHARNNConfig

@dataclass
class OwnConfig(SHARNNConfig):
    pass

@register_model("own_model", dataclass=OwnConfig)
class Own(SHARNN):
    pass
"""


def test_user_dir_makes_a_model_of_ones_own_known(data, path, tmp_path):
    (tmp_path / "own_plugin").mkdir()
    (tmp_path / "own_plugin" / "__init__.py").write_text(PLUGIN)
    state = torch.load(path, weights_only=True)
    state["cfg"]["model"]["_name"] = "own_model"
    torch.save(state, tmp_path / "own.pt")
    words = ["evaluate", data, "--path", str(tmp_path / "own.pt"), "--cpu"]
    done = fairseq_sha(*words, cwd=REPOSITORY)
    assert done.returncode == 1
    assert b"--arch own_model is not registered; name the plug-in" in done.stderr
    done = fairseq_sha(*words, "--user-dir", str(tmp_path / "own_plugin"), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert b"832 tokens" in done.stdout


@pytest.mark.parametrize("name", ["--help", "compress"])
def test_reader_that_was_never_there(path, tmp_path, name):
    (tmp_path / "text").write_bytes(b"abc")
    words, unbuffered = ["--help"], ""  # help is printed, and fails, at the very end
    if name == "compress":  # which goes on after a file that cannot be compressed
        words, unbuffered = ["compress", "--path", path, "--cpu", str(tmp_path / "text")], "1"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_sha", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr


def test_overrides_reach_the_task(data, path, tmp_path, capsys):
    words = ["evaluate", data, "--path", path, "--cpu", "--model-overrides"]
    assert main([*words, "{'tokens_per_sample': 7}"]) == 0
    assert "segments of 7" in capsys.readouterr().out
    (tmp_path / "text").write_bytes(text(100))
    words = ["score", str(tmp_path / "text"), "--path", path, "--cpu", "--model-overrides"]
    assert main([*words, "{'tokens_per_sample': '7'}"]) == 0
    assert "segments of 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("{'window': 'many'}", "--model-overrides {'window': 'many'}: "),
        ("{'_name': 'min_rnn'}", "--model-overrides _name: the model has no such setting"),
        ("{'data': '/'}", "--model-overrides data: says what is read; leave it out"),
        ("{'model': {'window': 5}}", "--model-overrides model: the model has no such setting"),
        ("{'tokens_per_sample': 'many'}", "--model-overrides {'tokens_per_sample': 'many'}: "),
        ("{'tokens_per_sample': 0}", "--tokens-per-sample 0: must be at least 1"),
        ("{'width': 8}", "the checkpoint is of another model or other sizes"),
    ],
)
def test_overrides_that_do_not_fit(path, capsys, overrides, message):
    words = ["generate", "--path", path, "--cpu", "--model-overrides", overrides]
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_plug_in_whose_name_is_taken(data, path, tmp_path, capsys):
    (tmp_path / "json").mkdir()
    words = ["evaluate", data, "--path", path, "--cpu", "--user-dir", str(tmp_path / "json")]
    assert main(words) == 1
    assert "another module has this name; rename it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codec": "runes"}, "its codec 'runes' is unknown"),
        ({"symbols": ["<s>", "<pad>", "</s>", "<unk>", "97", "97"]}, "are not a dictionary's"),
    ],
)
def test_checkpoint_whose_symbols_mean_nothing(path, tmp_path, capsys, change, message):
    state = torch.load(path, weights_only=True)
    state["task_state"].update(change)
    torch.save(state, tmp_path / "other.pt")
    words = ["score", "--path", str(tmp_path / "other.pt"), "--cpu", path]
    assert main(words) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def diverged(path, tmp_path):
    """A checkpoint of a model one of whose weights is not finite."""
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.embedding.weight"][-1, 0] = math.inf
    torch.save(state, tmp_path / "diverged.pt")
    return str(tmp_path / "diverged.pt")


@pytest.mark.parametrize(
    "words, package",
    [
        ("generate --path {}", "torch"),
        ("compress --path {} text", "constriction"),
        ("export --path {} --save model.onnx", "onnxruntime"),
        ("quantize --path {} --data {data}", "torch"),
        ("tune-dynamic {data} --path {} --dynamic sgd", "torch"),
    ],
)
def test_diverged_models_are_for_scores_only(
    diverged, data, tmp_path, monkeypatch, capsys, words, package
):
    pytest.importorskip(package)
    (tmp_path / "text").write_bytes(text(100))
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert main([*words.format(diverged, data=data).split(), "--cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "decoder.embedding.weight is not finite, so training has diverged; "
        "name an earlier checkpoint"
    )
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("words", ["evaluate {data} --path {}", "score --path {} text"])
def test_score_of_a_diverged_model_is_nan(diverged, data, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "text").write_bytes(text(100))
    monkeypatch.chdir(tmp_path)
    assert main([*words.format(diverged, data=data).split(), "--cpu"]) == 0
    assert "nan bits per byte" in capsys.readouterr().out
