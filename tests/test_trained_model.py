"""What a trained model is for: text and scores."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.commands import main
from fairseq_sha.trained_model import TrainedModel, digest
from tests.commands import REPOSITORY
from tests.options import FAMILIES
from tests.tiny_corpus import text, write_folder


@pytest.fixture(params=FAMILIES)
def model(request, checkpoints):
    return TrainedModel.load(checkpoints[request.param], cpu=True)


@pytest.fixture
def path(checkpoints):
    return str(checkpoints["SHARNN"])


@pytest.fixture
def sha_rnn(path):
    return TrainedModel.load(path, cpu=True)


def test_bits_are_those_of_one_pass(model):
    data = text(55, seed=5)  # two segments, within the window
    expected = model.score(data.decode())["positional_scores"].double() / -np.log(2)
    np.testing.assert_allclose(model.bits(data), expected, atol=1e-4)
    assert len(model.bits(b"")) == 0


def test_checkpoint_without_symbols_needs_its_data_folder(path, tmp_path):
    state = torch.load(path, weights_only=True)
    del state["task_state"]
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(UserError, match="dict.txt: no such file"):
        TrainedModel.load(tmp_path / "old.pt", cpu=True)
    data = write_folder(tmp_path)
    model = TrainedModel.load(tmp_path / "old.pt", data, cpu=True)
    assert len(model.bits(b"abc")) == 3


def test_checkpoint_of_another_task_is_refused(path, tmp_path):
    state = torch.load(path, weights_only=True)
    state["cfg"]["task"]["_name"] = "language_modeling"
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="--task byte_language_modeling"):
        TrainedModel.load(tmp_path / "other.pt", cpu=True)


# Generation


def test_any_prompt_is_continued(model):
    for prompt in (b"", b"a", b"abc\nde\n", b"abc " * 40):
        out = model.continuation(prompt, 30, sampling=True, beam=1)
        assert len(out) == 30 and set(out) <= set(b"abcdefgh \n")
    long = model.continuation(b"", 300, sampling=True, beam=1)
    assert b"\n" in long[:-1]


def test_symbols_of_no_probability_do_not_end_sampling(path):
    """As the one for the end has in imported weights, and any at a low temperature."""
    model = TrainedModel.load(path, cpu=True)
    with torch.no_grad():
        model.decoder.head.bias[model.dictionary.bos()] = -1e4
    out = model.continuation(b"abc", 20, sampling=True, beam=1)
    assert len(out) == 20
    tokens = model.encode(b"abc" + out)
    hypothesis = model.generate(
        [tokens], beam=1, sampling=True, temperature=0.003, max_len_b=len(tokens)
    )[0][0]
    assert torch.equal(hypothesis["tokens"][: len(tokens)], tokens)
    logits, _ = model.read(
        torch.cat([torch.tensor([model.dictionary.eos()]), tokens[:-1]])[:, None]
    )
    expected = (logits[:, 0] / 0.003).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    actual = hypothesis["positional_scores"][: len(tokens)]
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=1e-3)


def test_bytes_that_are_no_text_are_generated(path):
    """A byte that is no UTF-8 takes a letter's place in the dictionary."""
    model = TrainedModel.load(path, cpu=True)
    symbols = model.dictionary.symbols
    symbols[symbols.index("97")] = "255"
    model.dictionary.indices["255"] = model.dictionary.indices.pop("97")
    out = model.continuation(b"\xffb", 200, sampling=True, beam=1)
    assert b"\xff" in out and b"a" not in out and len(out) == 200


def test_generate_writes_prompt_and_continuation(path, capfdbinary):
    def written(*options):
        assert main(["generate", "--path", path, "--cpu", "--length", "60", *options]) == 0
        return capfdbinary.readouterr().out

    drawn = written("--prompt", "abc\nd", "--seed", "3")
    assert drawn.startswith(b"abc\nd") and len(drawn) == 5 + 60 + 1
    assert drawn == written("--prompt", "abc\nd", "--seed", "3")
    assert drawn != written("--prompt", "abc\nd", "--seed", "4")
    greedy = written("--beam", "1")
    assert greedy == written("--top-k", "1") == written("--top-p", "1e-6")
    assert greedy != written("--top-k", "100", "--seed", "3")
    assert len(written("--beam", "3")) == 61
    assert len(written("--samples", "2")) == 2 * 61


def test_limits_of_training_do_not_hold_for_prompts(path, tmp_path):
    state = torch.load(path, weights_only=True)
    state["cfg"]["dataset"].update(max_tokens=20, batch_size=2)
    torch.save(state, tmp_path / "model.pt")
    model = TrainedModel.load(str(tmp_path / "model.pt"), cpu=True)
    assert len(model.continuation(b"abc " * 20, 10)) == 10
    assert model.models[0].max_positions() > 1e12
    prompts = [model.encode("abc")] * 3
    assert [len(batch["id"]) for batch in model._build_batches(prompts, False)] == [2, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", "0"], "--length 0: must be positive"),
        (["--temperature", "-1"], "--temperature -1.0: must be from 0.01 to 100"),
        (["--temperature", "1e-40"], "--temperature 1e-40: must be from 0.01 to 100"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--top-k", "-2"], "--top-k -2: must be positive"),
        (["--beam", "2", "--top-k", "2"], "--beam does not draw"),
        (["--top-p", "0.5", "--top-k", "2"], "--top-k and --top-p: choose one"),
        (["--beam", "500"], "--beam 500: too many for 16 symbols"),
        (["--prompt", "z"], "byte 122 at offset 0"),
    ],
)
def test_generate_refuses(path, capsys, options, message):
    assert main(["generate", "--path", path, "--cpu", *options]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_generate_goes_on_from_any_bytes_of_standard_input(path):
    argv = [sys.executable, "-m", "fairseq_sha", "generate", "--path", path, "--cpu"]
    done = subprocess.run(
        [*argv, "--prompt-file", "-", "--length", "20"],
        cwd=REPOSITORY,
        input=b"abc\n\nd",
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"abc\n\nd") and len(done.stdout) == 6 + 20 + 1


# Prompts


def reads(decoder):
    """How many times a decoder runs its layers: a list that grows."""
    calls = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3}, {"beam": 3, "temperature": 1.7}])
def test_prompts_are_read_in_segments_with_the_result_of_steps(model, monkeypatch, options):
    """fairseq reads a prompt one token a step; prompts may differ in length."""
    prompts = [model.encode(text(size, seed=size)) for size in (53, 50, 44)]  # within any memory

    def generate():
        calls = reads(model.decoder)
        return model.generate(prompts, max_len_b=130, **options), calls

    fast, calls = generate()
    # Segments of 40, and then the steps that are left of each. Where a window begins, what it
    # shares with the last one is read again with the next token.
    longest = 40
    if hasattr(model.decoder, "eval_stride"):
        longest = max(40, model.decoder.window - model.decoder.eval_stride + 1)
    assert max(calls) == longest and len(calls) < 3 * 131 - sum(map(len, prompts)) + 10
    assert model.decoder.generation_start is None
    monkeypatch.setattr("fairseq_sha.tasks.generation.SegmentDecoder", type(None))
    slow, calls = generate()
    assert len(calls) > 130
    for prompt, actual, expected in zip(prompts, fast, slow):
        assert len(actual) == len(expected) == options["beam"]
        # Rounding decides between hypotheses of nearly the same score.
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a["score"], b["score"], atol=1e-3, rtol=1e-3)
            assert torch.equal(a["tokens"][: len(prompt)], prompt) and len(a["tokens"]) == 131
            known = (h["positional_scores"][: len(prompt)] for h in (a, b))
            torch.testing.assert_close(*known, atol=1e-3, rtol=1e-3)
        if options["beam"] == 1:
            assert torch.equal(actual[0]["tokens"], expected[0]["tokens"])


def test_prompt_as_long_as_the_text(sha_rnn):
    prompt = text(60, seed=2)
    tokens = sha_rnn.encode(prompt)
    hypothesis = sha_rnn.generate([tokens], beam=1, max_len_b=60)[0][0]
    assert torch.equal(hypothesis["tokens"][:60], tokens)
    expected = sha_rnn.score(prompt.decode())["positional_scores"]
    actual = hypothesis["positional_scores"][:60]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_models_with_scalar_parameters_have_a_digest():
    weights = {"scale": torch.tensor(2.0), "weight": torch.zeros(2, 3)}
    first = digest(weights, {}, ["a"])
    assert len(first) == 8 and first == digest(dict(weights), {}, ["a"])
    assert first != digest({**weights, "scale": torch.tensor(3.0)}, {}, ["a"])


def test_digest_stays_the_same():
    """Files that were compressed with a model name it by this."""
    weights = {"w": torch.arange(6.0).view(2, 3)}
    assert digest(weights, {"width": 3}, ["a"]).hex() == "6cbf53a3be8a24ab"
