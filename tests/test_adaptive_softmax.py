"""The commands with adaptive input and softmax."""

import re

import pytest
import torch

from fairseq_sha import commands
from fairseq_sha.trained_model import TrainedModel
from tests.commands import command, logged_losses
from tests.options import FAMILIES
from tests.tasks.test_words import write_words
from tests.test_workers import train_with_workers

TASK = {"task": "segment_language_modeling"}
BANDS = "--cutoffs 3,6 --div-val 2 --dropout-projection 0.1"
OURS = "--criterion cross_entropy_with_auxiliary_losses"
ADAPTIVE = {
    name: f"{re.sub('--criterion [a-z_]+', '', FAMILIES[name])} {BANDS}"
    for name in ("SHARNN", "TransformerXL", "SRUpp")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_words(folder)
    return folder


def train(data, options):
    done = command("fairseq-train", data, options, **TASK)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module", params=ADAPTIVE)
def run(request, data, tmp_path_factory):
    """A family, the folder of its checkpoints, and what the training of it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    options = f"{ADAPTIVE[request.param]} {OURS} --max-update 8 --save-interval-updates 4"
    return request.param, folder, train(data, f"{options} --save-dir {folder}")


def evaluation(data, folder):
    options = f"--path {folder}/checkpoint_last.pt --cpu --batch-size 4 --tokens-per-sample 40"
    done = command("fairseq-eval-lm", data, options, **TASK)
    return re.findall(r"Evaluated (\d+) tokens|Loss \(base 2\): ([0-9.]+)", done.stdout)


def test_fairseqs_criterion_trains_the_same(run, data, tmp_path):
    family, folder, expected = run
    options = f"{ADAPTIVE[family]} --max-update 8 --save-interval-updates 4 --save-dir {tmp_path}"
    options += " --criterion adaptive_loss --ddp-backend legacy_ddp"
    theirs = train(data, options)
    valid = r"valid on 'valid' subset.*? nats ([0-9.]+) \| bpb ([0-9.]+) \| ppl ([0-9.]+)"
    assert re.findall(valid, theirs) == re.findall(valid, expected)
    gradients = {update: norm for update, (_, norm) in logged_losses(theirs).items()}
    assert gradients == {update: norm for update, (_, norm) in logged_losses(expected).items()}
    scores = evaluation(data, tmp_path)
    assert scores == evaluation(data, folder) and scores[0][0] == "239"


def test_resumed_run_repeats_the_uninterrupted_one(run, data, tmp_path):
    family, folder, whole = run
    options = f"{ADAPTIVE[family]} {OURS} --max-update 8 --save-dir {tmp_path}"
    resumed = train(data, f"{options} --restore-file {folder}/checkpoint_1_4.pt")
    expected, losses = logged_losses(whole), logged_losses(resumed)
    assert len(losses) == 4 and losses == {update: expected[update] for update in losses}


def test_tied_parameters_are_saved_once(run):
    _, folder, _ = run
    saved = torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
    names = [name for name in saved if re.match(r"decoder\.(embedding|head)\.", name)]
    assert not any("head.weight" in name or "head.tail_weights" in name for name in names)
    model = TrainedModel.load(str(folder / "checkpoint_last.pt"), cpu=True)
    assert model.decoder.head.weight is model.decoder.embedding.weight


def test_text_is_scored_and_continued(run, tmp_path, capfd):
    _, folder, _ = run
    path = str(folder / "checkpoint_last.pt")
    (tmp_path / "text").write_text("the river a\nsea the\n")
    argv = ["--path", path, "--cpu"]
    assert commands.main(["score", *argv, "--per-token", str(tmp_path / "text")]) == 0
    *tokens, total = capfd.readouterr().out.splitlines()
    assert len(tokens) == 7
    mean = sum(float(line.split("\t")[0]) for line in tokens) / 7
    nats = float(re.search(r"([0-9.]+) nats per token", total)[1])
    assert mean == pytest.approx(nats / 0.6931, abs=0.002)
    argv += ["--prompt", "the river", "--length", "5"]
    assert commands.main(["generate", *argv, "--beam", "2"]) == 0
    assert len(capfd.readouterr().out.split()) >= 2


def test_two_workers_with_half_the_streams_give_what_one_gives(data, tmp_path):
    """Some batches have no word of the last band, on one of them or on both."""
    options = f"{ADAPTIVE['TransformerXL']} {OURS} --dropout 0 --dropout-projection 0"
    options += f" --max-update 8 --cutoffs 3,8 --save-dir {tmp_path}"
    one = train(data, f"{options}/one")
    half = options.replace("--batch-size 4", "--batch-size 2")
    two = train_with_workers(data, f"{half}/two", **TASK)
    for name in ("loss", "nats"):
        values = [re.findall(rf"[ ,]{name}[= ]([0-9.]+)", output) for output in (one, two)]
        assert len(values[0]) == len(values[1]) >= 1
        for first, second in zip(*values):
            assert float(first) == pytest.approx(float(second), abs=2e-3)
