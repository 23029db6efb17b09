"""Likelihoods of continuations, against the cost of the whole text."""

import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.continuations import continue_until, generation_options, log_likelihoods
from fairseq_sha.data import pieces
from fairseq_sha.data.codecs import PieceCodec, WordCodec
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.random_checkpoint import SPECIAL
from tests.tiny_corpus import text


def make_codec(name):
    if name == "words":
        words = ["the", "river", "a"]
        return WordCodec.from_symbols([*SPECIAL, *words])
    if name == "pieces":
        tokenizer = pieces.train(pieces.lines([text(20000)]), 300)
        symbols = sorted(s for s in tokenizer.get_vocab() if s != pieces.NEWLINE)
        return PieceCodec.from_symbols([*SPECIAL, *symbols], tokenizer=tokenizer.to_str())
    return random_checkpoint.BYTES


@pytest.fixture(scope="module", params=["bytes", "pieces", "words"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model.pt"
    return TrainedModel.load(
        random_checkpoint.write(path, make_codec(request.param), tokens_per_sample=16), cpu=True
    )


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "model.pt"
    return TrainedModel.load(random_checkpoint.write(path, tokens_per_sample=16), cpu=True)


#: A piece of several bytes, which its last byte completes.
LONGEST = max(make_codec("pieces").texts(), key=len)
CONTEXTS = {
    "bytes": text(100, seed=2),  # more than the window of attention holds
    "pieces": text(300, seed=2).rstrip() + LONGEST[:-1],
    "words": b"the river a " * 40 + b"the",
}
CONTINUATIONS = {
    "bytes": [b"a", b"hab c\n", text(50)],
    "pieces": [LONGEST[-1:], b"\n", b"\xff", text(80)],
    "words": [b" river", b" a\nzebra the", b"m"],
}


@pytest.mark.parametrize("has_context", [True, False])
def test_equals_the_cost_of_all_less_that_of_the_context(model, has_context):
    context = CONTEXTS[model.codec.name] if has_context else b""
    continuations = CONTINUATIONS[model.codec.name]
    found = log_likelihoods(model, context, continuations)
    for continuation, (value, _) in zip(continuations, found):
        before = model.encode(context).tolist()
        _, tokens, nats = model.costs(context + continuation)
        # Tokens of the context that the continuation changes belong to the continuation.
        while before != tokens[: len(before)].tolist():
            before.pop()
        assert len(before) < len(tokens)
        assert value == pytest.approx(-float(nats[len(before) :].sum()), abs=1e-3)


def test_pieces_and_words_over_the_border_count_as_a_whole():
    """The cases of the test above are what they are meant to be."""
    for name in ("pieces", "words"):
        codec, changed = make_codec(name), 0
        before = codec.encode(CONTEXTS[name]).tolist()
        for continuation in CONTINUATIONS[name]:
            whole = codec.encode(CONTEXTS[name] + continuation).tolist()
            changed += whole[: len(before)] != before
        assert 0 < changed < len(CONTINUATIONS[name])


def test_greedy_continuation_is_called_greedy(model):
    context = CONTEXTS[model.codec.name]
    if model.codec.name == "words":
        context += b" "
    greedy = model.continuation(context, 30, beam=1)
    _, tokens, _ = model.costs(context + greedy)
    if tokens[len(model.encode(context)) :].tolist() != model.encode(greedy).tolist():
        pytest.skip("the greedy pieces are not those of their text")
    other = greedy[:-3] + bytes([greedy[-3] ^ 1]) + greedy[-2:]
    if model.codec.name == "bytes":
        other = greedy[:-3] + (b"a" if greedy[-3:-2] != b"a" else b"b") + greedy[-2:]
    if model.codec.name == "words":
        other = b"zebra " + greedy
    (_, first), (_, second) = log_likelihoods(model, context, [greedy, other])
    assert first and not second


def test_nothing_is_certain_and_greedy(of_bytes):
    assert log_likelihoods(of_bytes, b"abc", [b""]) == [(0.0, True)]
    assert log_likelihoods(of_bytes, b"", [b""]) == [(0.0, True)]
    assert log_likelihoods(of_bytes, b"abc", []) == []


def test_context_is_read_once_for_all_continuations(of_bytes):
    calls = []
    hook = of_bytes.decoder.layers[0].register_forward_pre_hook(
        lambda _, inputs: calls.append(len(inputs[0]))
    )
    log_likelihoods(of_bytes, text(16 * 10 + 3), [b"a", b"bb", b"c"])
    hook.remove()
    assert calls == [16] * 10 + [4, 5, 4]


def test_byte_that_the_model_lacks_is_named(of_bytes):
    with pytest.raises(UserError, match="byte 90 at offset 4 of the text"):
        log_likelihoods(of_bytes, b"abc", [b"a", b"aZ"])


def test_generation_ends_before_the_first_of_the_strings(model):
    context = CONTEXTS[model.codec.name]
    whole = model.continuation(context, 150, beam=1)
    assert continue_until(model, context, [], 150, beam=1) == whole
    assert continue_until(model, context, [b"", b"never \xff\xfe"], 150, beam=1) == whole
    late, later = whole[len(whole) // 2 :][:12], whole[-9:]
    found = continue_until(model, context, [later, late], 150, beam=1)
    assert found == whole[: min(whole.find(late), whole.find(later))]
    assert continue_until(model, context, [whole[:1]], 150, beam=1) == b""
    assert continue_until(model, context, [late], 0, beam=1) == b""


def test_options_of_other_libraries():
    assert generation_options() == generation_options(True, 0) == {"beam": 1}
    assert generation_options(False, 0.5, 40, 0.9) == {"beam": 1}
    drawn = {"beam": 1, "sampling": True, "temperature": 0.5}
    of_few = {**drawn, "sampling_topk": 40, "sampling_topp": -1.0}
    assert generation_options(True, 0.5, 40) == generation_options(True, 0.5, 40, 1.0) == of_few
    of_share = {**drawn, "sampling_topk": -1, "sampling_topp": 0.9}
    assert generation_options(True, 0.5, 0, 0.9) == of_share
    with pytest.raises(UserError, match="top_k 40 and top_p 0.9: choose one"):
        generation_options(True, 0.5, 40, 0.9)
    for wrong in ((True, -1.0), (True, 1.0, -5), (True, 1.0, None, 1.5)):
        with pytest.raises(UserError, match="give a positive temperature"):
            generation_options(*wrong)


def test_sampling_differs_from_one_time_to_the_next(of_bytes):
    options = generation_options(True, 3.0, top_k=50)  # of 13 symbols
    torch.manual_seed(1)
    first, second = (continue_until(of_bytes, b"ab", [], 60, **options) for _ in range(2))
    assert first != second
