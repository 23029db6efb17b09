"""fairseq's own language models under the tasks: without state, every token once."""

import json
import re

import pytest
import torch

from fairseq_sha.commands import main
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.data.segments import SegmentDataset
from tests.commands import command, logged_losses
from tests.test_bad_input import check, message_of
from tests.test_commands import in_process
from tests.tiny_corpus import text, write_folder, write_split

TEST_BYTES = 833
SIZE = "--decoder-layers 1 --decoder-embed-dim 16"
STOCK = {
    "transformer_lm": f"{SIZE} --decoder-attention-heads 2 --decoder-ffn-embed-dim 32",
    "lstm_lm": f"{SIZE} --decoder-hidden-size 16 --decoder-out-embed-dim 16",
}
TRAINING = """--tokens-per-sample 40 --random-segment-lengths --batch-size 4 --num-workers 0
    --optimizer adam --lr 0.01 --log-interval 1 --log-format simple --cpu
    --save-interval-updates 4 --no-epoch-checkpoints"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # Of 6,001 bytes the longest of 7 streams has a segment more than the others.
    return write_folder(tmp_path_factory.mktemp("data"), train=6001, test=TEST_BYTES)


@pytest.fixture(scope="module", params=STOCK)
def run(data, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    options = f"--arch {request.param} {STOCK[request.param]} {TRAINING}"
    done = command("fairseq-train", data, f"{options} --max-update 60 --save-dir {folder}")
    assert done.returncode == 0, done.stdout
    return folder, options, done.stdout


def test_trains_into_the_second_epoch(run):
    losses = [float(loss[5:].rstrip(",")) for loss, _ in logged_losses(run[2]).values()]
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.5
    assert "carried state" not in run[2]


def test_resumed_run_repeats_the_uninterrupted_one(data, run, tmp_path):
    _, options, output = run
    options += f" --save-dir {tmp_path} --max-update"
    first = command("fairseq-train", data, f"{options} 6")
    second = command("fairseq-train", data, f"{options} 10")
    assert second.returncode == 0, second.stdout
    losses = {**logged_losses(first.stdout), **logged_losses(second.stdout)}
    expected = logged_losses(output)
    assert len(losses) == 10 and losses == {update: expected[update] for update in losses}
    assert "from nothing" not in second.stdout


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8, 40])
@pytest.mark.parametrize("tokens_per_sample", [7, 40])
def test_evaluation_counts_every_token_once(
    data, run, monkeypatch, caplog, batch_size, tokens_per_sample
):
    options = ["--batch-size", batch_size] if batch_size else []
    options += ["--tokens-per-sample", tokens_per_sample, "--gen-subset", "test", "--cpu"]
    path = run[0] / "checkpoint_last.pt"
    log = in_process("eval_lm", monkeypatch, caplog, data, "--path", path, *options)
    assert f"Evaluated {TEST_BYTES - 1:,} tokens" in log
    assert 1 < float(re.search(r"Loss \(base 2\): ([0-9.]+)", log).group(1)) < 4


@pytest.mark.parametrize("batch_size", [1, 5])
def test_context_window_slides_over_every_token_once(data, run, monkeypatch, caplog, batch_size):
    """Every token has at least the context, so that the score improves and does not depend on the
    batch size."""

    def evaluate(*options):
        options = [*options, "--tokens-per-sample", 40, "--gen-subset", "test", "--cpu"]
        path = run[0] / "checkpoint_last.pt"
        log = in_process("eval_lm", monkeypatch, caplog, data, "--path", path, *options)
        assert f"Evaluated {TEST_BYTES - 1:,} tokens" in log
        return log, float(re.search(r"Loss \(base 2\): ([0-9.]+)", log).group(1))

    _, without = evaluate("--batch-size", 1)
    log, slid = evaluate("--batch-size", batch_size, "--context-window", 33)
    assert "sliding window, context of at least 33, stride 7" in log
    _, expected = evaluate("--batch-size", 3, "--context-window", 33)
    assert slid == expected != without


@pytest.mark.parametrize("options", ["--context-window 33", ""])
def test_evaluate_agrees_with_fairseq(data, run, monkeypatch, caplog, capsys, tmp_path, options):
    words = f"{options} --batch-size 3 --tokens-per-sample 40 --cpu".split()
    path = run[0] / "checkpoint_last.pt"
    log = in_process(
        "eval_lm", monkeypatch, caplog, data, "--path", path, "--gen-subset", "test", *words
    )
    expected = float(re.search(r"Loss \(base 2\): ([0-9.]+)", log).group(1))
    file = tmp_path / "score.json"
    assert main(["evaluate", data, "--path", str(path), *words, "--json", str(file)]) == 0
    score = json.loads(file.read_text())
    assert f"{score['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    assert score["bits_per_byte"] == pytest.approx(expected, abs=6e-5)
    assert score["tokens"] == score["bytes"] == TEST_BYTES - 1
    assert score["seconds"] > 0
    assert score["policy"].startswith("sliding window" if options else "no state, 3 streams")
    assert score["streams"] == (None if options else 3)


def test_other_commands_refuse_a_stock_model(run, tmp_path, capsys):
    file = tmp_path / "text"
    file.write_bytes(b"abc")
    assert main(["score", str(file), "--path", str(run[0] / "checkpoint_last.pt"), "--cpu"]) == 1
    assert "is not a model of fairseq_sha; use fairseq-sha evaluate" in capsys.readouterr().err


def test_settings_of_a_stock_model_can_be_changed(data, run, capsys):
    words = ["evaluate", data, "--path", str(run[0] / "checkpoint_last.pt"), "--cpu"]
    assert main([*words, "--model-overrides", "{'no_such': 1}"]) == 1
    assert "no_such: the model has no such setting" in capsys.readouterr().err
    assert main([*words, "--model-overrides", "{'decoder_layers': 1}"]) == 0


def test_segments_longer_than_the_model_can_read_are_refused(data, run, monkeypatch):
    if "lstm_lm" in run[1]:
        pytest.skip("as the Transformer")
    path = run[0] / "checkpoint_last.pt"
    words = f"--path {path} --cpu --gen-subset test --tokens-per-sample 41"
    expected = "--tokens-per-sample 41: this model reads at most 40 tokens at once"
    check(message_of("eval_lm", data, words, monkeypatch), expected)


def test_streams_that_have_ended_are_filled_with_tokens(tmp_path):
    """Of nothing but padding, a Transformer's gradient would not be a number."""
    corpus = Corpus(write_split(text(83), tmp_path))
    dataset = SegmentDataset(corpus, None, 1, 1, batch_size=3, tokens_per_sample=9, filler=2)
    last = dataset[len(dataset) - 1]
    assert (last["target"] == 1).all(1).any()
    assert not (last["net_input"]["src_tokens"] == 1).any()
    assert "segment" not in last["net_input"]
    assert sum(dataset[i]["ntokens"] for i in range(len(dataset))) == 82
    assert torch.equal(last["target"] != 1, last["net_input"]["src_tokens"] != 2)


def test_there_is_no_state_to_drop(data, tmp_path, monkeypatch):
    options = f"--arch lstm_lm {STOCK['lstm_lm']} {TRAINING} --save-dir {tmp_path}/out"
    options += " --criterion cross_entropy --max-update 2 --drop-state-probability 0.1"
    message = message_of("train", data, options, monkeypatch)
    check(message, "--drop-state-probability 0.1: --arch lstm_lm carries no state in training;")
    message = message_of("train", data, f"{options} --checkpoint-activations", monkeypatch)
    check(message, "--checkpoint-activations: not supported for --arch lstm_lm; leave it out")
