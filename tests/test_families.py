"""What users type, with each model family beside SHA-RNN: train, resume, evaluate, generate."""

import re

import pytest
import torch

from fairseq_sha.models.family import FAMILIES
from tests.commands import command, logged_losses
from tests.options import options_of
from tests.test_commands import in_process
from tests.tiny_corpus import write_folder

TEST_BYTES = 833
# The frequencies of single bytes give 3.13 bits, and those of pairs 1.83.
LEARNED = 2.75

OTHERS = [family for name, family in FAMILIES.items() if name != "sha_rnn"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), test=TEST_BYTES)


@pytest.fixture(scope="module", params=OTHERS, ids=lambda family: family.name)
def trained(request, data, tmp_path_factory):
    """A family, its options, and an uninterrupted run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    options = f"{options_of(request.param)} --save-interval-updates 7 --no-epoch-checkpoints"
    options += " --max-update 150"
    done = command("fairseq-train", data, f"{options} --save-dir {folder}")
    assert done.returncode == 0, done.stdout
    return request.param, options, folder, done.stdout


def test_training_learns(trained):
    bits = [float(value) for value in re.findall(r"train_inner.*?bpc=([0-9.]+)", trained[3])]
    assert len(bits) == 150 and bits[0] == pytest.approx(4, abs=0.5)
    valid = re.findall(r"valid on 'valid' subset.*?bpc (\S+)", trained[3])
    assert float(valid[-1]) < LEARNED


def test_spans_stay_in_bounds_and_are_logged(trained):
    family, _, folder, output = trained
    if family.name != "adaptive_span":
        pytest.skip("has no spans")
    for name in ("span_mean", "span_max", "span_loss"):
        assert len(re.findall(rf"train_inner.*?{name}=[0-9.]+", output)) == 150
    assert "span_loss" not in re.search(r"valid on 'valid'.*", output).group()
    weights = torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
    spans = torch.cat([value for name, value in weights.items() if name.endswith("span")])
    # The loss would drive them below 0.
    assert len(spans) == 4 and spans.min() == 0 and spans.max() <= 1
    first = re.search(r"train_inner.*?span_max=([0-9.]+)", output).group(1)
    assert float(first) == 0


def test_resumed_run_repeats_the_uninterrupted_one(data, trained, tmp_path):
    """Carried state, dropout and schedule all go on, in mid-epoch."""
    _, options, folder, output = trained
    (checkpoint,) = folder.glob("checkpoint_*_133.pt")
    options += f" --restore-file {checkpoint} --save-dir {tmp_path}"
    done = command("fairseq-train", data, options)
    losses, expected = logged_losses(done.stdout), logged_losses(output)
    assert "carried state" not in done.stdout  # which warns of its absence
    assert len(losses) == 17, done.stdout
    assert losses == {updates: expected[updates] for updates in losses}


@pytest.mark.parametrize("batch_size, tokens_per_sample", [(1, 64), (3, 7), (40, 5000)])
def test_evaluation_counts_every_token_once(
    data, trained, monkeypatch, caplog, batch_size, tokens_per_sample
):
    options = ["--batch-size", batch_size, "--tokens-per-sample", tokens_per_sample]
    options += ["--gen-subset", "test", "--cpu", "--path", trained[2] / "checkpoint_last.pt"]
    text = in_process("eval_lm", monkeypatch, caplog, data, *options)
    assert f"Evaluated {TEST_BYTES - 1:,} tokens" in text
    assert float(re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)) < LEARNED


def test_text_is_generated_and_scored(data, trained):
    model = trained[0].model.from_pretrained(str(trained[2]), "checkpoint_last.pt", data)
    text = model.sample("abc\nde", sampling=True, max_len_b=90)
    assert text.startswith("abc\nde") and len(text) == 90 and set(text) <= set("abcdefgh \n")
    assert len(model.sample("abc", beam=3, max_len_b=30)) == 30
    text = "abc abc\nfed had a\ncab"
    tokens = model.encode(text)
    hypothesis = model.generate([tokens], beam=1, max_len_b=len(tokens) + 5)[0][0]
    torch.testing.assert_close(
        hypothesis["positional_scores"][: len(tokens)],
        model.score(text)["positional_scores"],
        atol=1e-4,
        rtol=1e-4,
    )


def test_criterion_that_leaves_out_auxiliary_losses_is_refused(data, tmp_path):
    options = f"{options_of(FAMILIES['adaptive_span'])} --criterion cross_entropy"
    done = command("fairseq-train", data, f"{options} --save-dir {tmp_path}")
    assert done.returncode != 0 and "Traceback" not in done.stdout
    expected = "error: --criterion cross_entropy: would leave out"
    assert done.stdout.strip().splitlines()[-1].startswith(expected)
