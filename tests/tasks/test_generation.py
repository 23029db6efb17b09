"""Prompts are read in segments, and nothing else changes: compared with fairseq, which reads them
one token per step."""

import copy

import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.trained_model import TrainedModel
from tests.options import FAMILIES
from tests.tiny_corpus import text

LENGTH = 60
PROMPT = text(55, seed=5)  # more than one segment, and within every window


@pytest.fixture(params=FAMILIES)
def model(request, checkpoints):
    return TrainedModel.load(checkpoints[request.param], cpu=True)


@pytest.fixture
def sha_rnn(checkpoints):
    return TrainedModel.load(checkpoints["SHARNN"], cpu=True)


def token_by_token(model, prompt, length, beam, **options):
    """fairseq's own hypotheses for one prompt."""
    args = copy.deepcopy(model.cfg.generation)
    args.beam = beam
    for name, value in options.items():
        setattr(args, name, value)
    generator = model.task.build_generator(model.models, args)
    generator.max_len_a, generator.max_len_b, generator.min_len = 0, length, length
    tokens = model.encode(prompt)[None]
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([len(prompt)])}}
    return generator.generate(
        model.models, sample, prefix_tokens=tokens, bos_token=model.codec.start
    )[0]


def assert_same(hypotheses, expected):
    assert len(hypotheses) == len(expected)
    for ours, theirs in zip(hypotheses, expected):
        assert torch.equal(ours["tokens"], theirs["tokens"])
        for key in ("positional_scores", "score"):
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beam, temperature", [(1, 1.0), (3, 1.0), (3, 0.6)])
def test_hypotheses_are_those_of_reading_token_by_token(model, beam, temperature):
    options = {"beam": beam, "temperature": temperature, "lenpen": 0.5}
    expected = token_by_token(model, PROMPT, LENGTH, **options)
    hypotheses = model.generate([model.encode(PROMPT)], max_len_b=LENGTH, **options)[0]
    assert_same(hypotheses, expected)
    assert model.decoder.generation_start is None


@pytest.mark.parametrize("unnormalized", [False, True])
def test_each_prompt_of_a_batch_is_continued_as_if_alone(sha_rnn, unnormalized):
    prompts = [PROMPT, b"a", b"", PROMPT[:50], b"b", PROMPT[:7]]
    options = {"beam": 3, "unnormalized": unnormalized}
    batch = [sha_rnn.encode(prompt) for prompt in prompts]
    hypotheses = sha_rnn.generate(batch, max_len_b=LENGTH, **options)
    for prompt, found in zip(prompts, hypotheses):
        assert_same(found, token_by_token(sha_rnn, prompt, LENGTH, **options))


@pytest.mark.parametrize("sampling", [False, True])
def test_a_short_prompt_does_not_end_while_a_longer_one_is_read(sha_rnn, sampling):
    """fairseq's minimum length and excluded symbols do not hold for a batch with a prompt left."""
    with torch.no_grad():
        sha_rnn.decoder.head.bias[sha_rnn.dictionary.bos()] = 20
        sha_rnn.decoder.head.bias[sha_rnn.dictionary.unk()] = 19
    texts = sha_rnn.sample(["abc" * 10, "d"], beam=1, sampling=sampling, max_len_b=40)
    assert texts[0].startswith("abc" * 10) and texts[1].startswith("d")
    assert [len(text) for text in texts] == [40, 40]
    assert set(texts[1]) <= set("abcdefgh \n")


@pytest.mark.parametrize("prompt", [PROMPT, b"a", b""])
def test_prompt_as_long_as_the_text(sha_rnn, prompt):
    hypotheses = sha_rnn.generate([sha_rnn.encode(prompt)], beam=1, max_len_b=len(prompt))[0]
    assert sha_rnn.codec.decode(hypotheses[0]["tokens"]) == prompt
    assert_same(hypotheses, token_by_token(sha_rnn, prompt, len(prompt), beam=1))


def test_few_calls_for_a_long_prompt(sha_rnn, monkeypatch):
    calls = {"read": 0, "forward": 0}

    def count(name):
        function = getattr(sha_rnn.decoder, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(sha_rnn.decoder, name, counted)

    for name in calls:
        count(name)
    assert len(sha_rnn.continuation(text(400), 5, beam=2)) == 5
    assert calls == {"read": 10, "forward": 6}  # segments of 40; five tokens and the end


def test_a_failure_leaves_no_state_behind(sha_rnn, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("in generation")

    with monkeypatch.context() as patch:
        patch.setattr(sha_rnn.decoder, "forward", fail)
        with pytest.raises(RuntimeError, match="in generation"):
            sha_rnn.continuation(PROMPT, 5, beam=1)
    assert sha_rnn.decoder.generation_start is None
    assert_same(
        sha_rnn.generate([sha_rnn.encode(b"")], beam=1, max_len_b=20)[0],
        token_by_token(sha_rnn, b"", 20, beam=1),
    )


def test_limits_of_the_generator_are_restored(sha_rnn):
    args = copy.deepcopy(sha_rnn.cfg.generation)
    args.max_len_a, args.max_len_b, args.beam = 1, 30, 1
    generator = sha_rnn.task.build_generator(sha_rnn.models, args)
    for prompt in (b"abcd", b"abcdefgh"):
        (batch,) = sha_rnn._build_batches([sha_rnn.encode(prompt)], False)
        hypothesis = sha_rnn.task.inference_step(generator, sha_rnn.models, batch)[0][0]
        assert len(hypothesis["tokens"]) == len(prompt) + 1 + 30 + 1
    assert (generator.max_len_a, generator.max_len_b, generator.min_len) == (1, 30, args.min_len)


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": 2}, {"diverse_beam_groups": 2}])
def test_options_that_look_at_the_prompt_see_it(sha_rnn, options):
    prompt = text(30, seed=9)
    hypotheses = sha_rnn.generate([sha_rnn.encode(prompt)], beam=2, max_len_b=45, **options)[0]
    assert_same(hypotheses, token_by_token(sha_rnn, prompt, 45, beam=2, **options))


def test_unknown_symbols_of_a_prompt_are_penalised(sha_rnn, monkeypatch):
    """As fairseq does, for codecs in which ``<unk>`` is an ordinary token."""
    monkeypatch.setattr(sha_rnn.task.codec, "not_generated", list)
    tokens = sha_rnn.encode(b"abcabc")
    tokens[3] = sha_rnn.dictionary.unk()
    monkeypatch.setattr(sha_rnn, "encode", lambda _: tokens)
    options = {"beam": 2, "unkpen": 1.5}
    expected = token_by_token(sha_rnn, b"abcabc", 20, **options)
    assert_same(sha_rnn.generate([tokens], max_len_b=20, **options)[0], expected)


def test_another_length_is_refused(sha_rnn):
    with pytest.raises(UserError, match="--match-source-len: .* leave it out"):
        sha_rnn.sample("abc", match_source_len=True, max_len_b=30)
