"""The rotary Transformer against its papers' equations, and against itself."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError, commands
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.rotary_transformer import (
    RotaryTransformerConfig,
    RotaryTransformerDecoder,
    angles,
    rotate,
)
from tests.commands import command
from tests.conftest import dictionary_of
from tests.models.helpers import (
    VOCABULARY,
    check_cuts,
    check_one_token_at_a_time,
    randomise,
    record_dropout,
)
from tests.options import options_of
from tests.tiny_corpus import write_folder

FAMILY = FAMILIES["rotary_transformer"]


def decoder(**fields):
    small = dict(width=16, num_layers=2, n_head=2, d_inner=40, eval_memory=20)
    cfg = OmegaConf.structured(RotaryTransformerConfig(**{**small, **fields}))
    return RotaryTransformerDecoder(cfg, dictionary_of(VOCABULARY))


def by_hand(model, tokens, reach):
    """Logits ``[T, V]`` of one stream, one query and key at a time. Each sees ``reach`` tokens
    before itself. Rotations are products of complex numbers, by the token's place in the text."""

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    def turned(x, position):
        d = len(x)
        steps = torch.tensor([position * 10000 ** (-2 * i / d) for i in range(d // 2)])
        pairs = torch.complex(x[0::2], x[1::2])
        return pairs * torch.polar(torch.ones(d // 2), steps)

    h = model.embedding.weight[tokens]
    width = h.size(1)
    for layer in model.layers:
        x = norm(h, layer.norm_attention)
        wq, wk, wv = layer.attention.query_key_value.weight.split(width)
        d = width // layer.attention.n_head
        rows = []
        for i in range(len(h)):
            heads = []
            for part in (slice(n, n + d) for n in range(0, width, d)):
                seen = range(max(i - reach, 0), i + 1)
                q = turned(wq[part] @ x[i], i)
                scores = [(q * turned(wk[part] @ x[j], j).conj()).real.sum() for j in seen]
                weights = (torch.stack(scores) / d**0.5).softmax(0)
                heads.append(sum(w * (wv[part] @ x[j]) for w, j in zip(weights, seen)))
            rows.append(torch.cat(heads))
        h = h + torch.stack(rows) @ layer.attention.output.weight.t()
        x = norm(h, layer.norm_feed_forward)
        w, v = layer.feed_forward.gate_and_value.weight.chunk(2)
        gate = x @ w.t()
        wide = gate / (1 + (-gate).exp()) * (x @ v.t())
        h = h + wide @ layer.feed_forward.output.weight.t()
    return norm(h, model.final_norm) @ model.embedding.weight.t() + model.head.bias


def check_equals(model, expected, actual):
    """Values, and the gradients of some function of them."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    weights = torch.randn_like(expected)
    names, parameters = zip(*model.named_parameters())
    of_expected, of_actual = (
        torch.autograd.grad((weights * logits).sum(), parameters) for logits in (expected, actual)
    )
    for name, slow, fast in zip(names, of_expected, of_actual):
        bound = 1e-3 * slow.abs().max().item()
        assert bound > 0, name
        torch.testing.assert_close(
            fast, slow, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training, eval_memory", [(True, 3), (False, 20), (False, 3)])
def test_equals_the_equations(training, eval_memory):
    """Training sees the whole segment, evaluation a band."""
    model = randomise(decoder(eval_memory=eval_memory)).train(training)
    tokens = torch.randint(VOCABULARY, (2, 12))
    reach = 12 if training else eval_memory
    expected = torch.stack([by_hand(model, stream, reach) for stream in tokens])
    check_equals(model, expected, model(tokens)[0])


def test_dropped_weights_take_another_path_to_the_same(monkeypatch):
    """With dropout that drops nothing."""
    monkeypatch.setattr("fairseq_sha.ops.attention.dropout", lambda x, p: x)
    monkeypatch.setattr("fairseq_sha.models.rotary_transformer.dropout", lambda x, p, training: x)
    monkeypatch.setattr(
        "fairseq_sha.models.segment_decoder.dropout", lambda x, p, training, shared: x
    )
    model = randomise(decoder(dropout=0.5))
    tokens = torch.randint(VOCABULARY, (1, 9))
    check_equals(model, by_hand(model, tokens[0], 9)[None], model(tokens)[0])


def test_a_score_depends_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 8)

    def turned(x, position):
        turns = angles(torch.tensor([position]), 8, 10000.0).unsqueeze(1)
        return rotate(x, turns.cos(), turns.sin())

    def score(i, j):
        return (turned(q, i) * turned(k, j)).sum()

    for distance in (0, 1, 7, 100):
        expected = score(distance, 0)
        for start in (1, 13, 400):
            torch.testing.assert_close(score(start + distance, start), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(score(5, 5), (q * k).sum(), atol=1e-4, rtol=0)
    assert (score(3, 0) - score(0, 3)).abs() > 0.01  # before is not after


def test_pairs_turn_by_the_frequencies_of_the_paper():
    turns = angles(torch.tensor([0, 1, 5]), 4, 100.0)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]])
    torch.testing.assert_close(turns, expected)


def test_half_precision_turns_in_single_precision():
    x = torch.randn(300, 1, 8)
    turns = angles(torch.arange(300), 8, 10000.0)[:, None]
    exact = rotate(x.bfloat16().float(), turns.cos(), turns.sin())
    assert torch.equal(rotate(x.bfloat16(), turns.cos(), turns.sin()), exact.bfloat16())


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder()).eval(), 20, atol=1e-4, rtol=1e-4)
    check_one_token_at_a_time(randomise(decoder(eval_memory=5)).eval(), 20, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eval_memory", [1, 6, 30])
def test_cutting_otherwise_changes_nothing(eval_memory):
    model = randomise(decoder(eval_memory=eval_memory)).eval()
    check_cuts(model, [24], [7, 9, 8], [5, 5, 5, 5, 4], [1] * 24, atol=1e-4, rtol=1e-4)


def train_segments(model, tokens, lengths):
    pieces = enumerate(tokens.split(lengths, 1))
    return torch.cat([model(piece, segment=f"train:1:{i}")[0] for i, piece in pieces], 1)


def test_training_with_memory_sees_the_text_before_the_segment():
    model = randomise(decoder(memory=12))
    tokens = torch.randint(VOCABULARY, (2, 20))
    whole = model(tokens)[0]
    halves = train_segments(model, tokens, [12, 8])
    torch.testing.assert_close(halves, whole, atol=1e-4, rtol=1e-4)
    halves.sum().backward()  # the memory has no gradient, and no graph that was freed
    for layer in model.carried._latest["train", True].state:
        assert layer["keys"].shape == layer["values"].shape == (12, 2, 16)
        assert not layer["keys"].requires_grad
    shorter = randomise(decoder(memory=4))
    shorter.load_state_dict(model.state_dict())
    parts = train_segments(shorter, tokens, [12, 8])
    torch.testing.assert_close(parts[:, :12], whole[:, :12], atol=1e-4, rtol=1e-4)
    assert (parts[:, 12:] - whole[:, 12:]).abs().max() > 0.01


def test_training_without_memory_takes_each_segment_on_its_own():
    model = randomise(decoder())
    tokens = torch.randint(VOCABULARY, (2, 20))
    alone = torch.cat([model(piece)[0] for piece in tokens.split([12, 8], 1)], 1)
    assert torch.equal(train_segments(model, tokens, [12, 8]), alone)
    assert model.carried.size() == 0


def test_initial_weights():
    """As GPT-2: what is added to the residual stream is smaller the more layers there are."""
    model = decoder(width=128, num_layers=8, d_inner=256)
    for layer in model.layers:
        for weight, std in (
            (layer.attention.query_key_value.weight, 0.02),
            (layer.feed_forward.gate_and_value.weight, 0.02),
            (layer.attention.output.weight, 0.02 / 4),
            (layer.feed_forward.output.weight, 0.02 / 4),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert (layer.norm_attention.weight == 1).all()
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight is model.embedding.weight
    assert not any("bias" in name for name, _ in model.layers.named_parameters())


def test_dropout_falls_on_embeddings_weights_and_sublayers(monkeypatch):
    modules = ("models.rotary_transformer", "models.segment_decoder", "ops.attention")
    seen = record_dropout(monkeypatch, *modules)
    decoder(num_layers=1, dropout=0.1)(torch.randint(VOCABULARY, (3, 5)))
    rows, weights = ((5, 3, 16), 0.1), ((2 * 3, 5, 5), 0.1)
    assert seen == [rows, weights, rows, rows]


def test_dropout_acts_in_training_only():
    model = randomise(decoder(dropout=0.3))
    tokens = torch.randint(VOCABULARY, (3, 20))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "name, millions", [("rotary_transformer_enwik8_12l", 41), ("rotary_transformer_small", 3.5)]
)
def test_sizes_of_named_architectures(name, millions):
    cfg = FAMILY.architectures[name]
    with torch.device("meta"):
        model = RotaryTransformerDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(n_head=3), "--n-head 3"),
        (dict(n_head=16), "--n-head 16: makes heads 1 wide"),
        (dict(num_layers=0), "--num-layers"),
        (dict(d_inner=0), "--d-inner"),
        (dict(memory=-1), "--memory"),
        (dict(eval_memory=0), "--eval-memory"),
        (dict(rotary_base=0.5), "--rotary-base"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder, and a checkpoint of a model with an eval_memory of 39 tokens."""
    data = write_folder(tmp_path_factory.mktemp("data"), test=833)
    folder = tmp_path_factory.mktemp("run")
    options = f"{options_of(FAMILY)} --max-update 40 --no-epoch-checkpoints --save-dir {folder}"
    done = command("fairseq-train", data, options)
    assert done.returncode == 0, done.stdout
    return data, folder / "checkpoint_last.pt"


def evaluate(trained, capsys, *options):
    data, path = trained
    words = ["evaluate", data, "--path", path, "--batch-size", 2, "--cpu", *options]
    status = commands.main([str(word) for word in words])
    return status, capsys.readouterr()


def test_sliding_windows_are_read_each_on_its_own(trained, capsys):
    """A stride of one token and all of its context is what one segment of the band gives."""
    options = ["--tokens-per-sample", 40, "--context-window"]
    scores = []
    for context in (0, 30, 39):
        status, printed = evaluate(trained, capsys, *options, context)
        assert status == 0, printed.err
        scores.append(float(re.search(r"([0-9.]+) nats per token", printed.out).group(1)))
        assert "832 tokens" in printed.out
        assert ("sliding window" in printed.out) == (context > 0)
    assert len(set(scores)) > 1 and max(scores) - min(scores) < 0.1


def test_windows_that_the_model_does_not_see_whole_are_refused(trained, capsys):
    options = ["--tokens-per-sample", 41, "--context-window", 30]
    status, printed = evaluate(trained, capsys, *options)
    assert status == 1
    assert "--tokens-per-sample 41: windows of this model have at most 40 tokens" in printed.err
    options += ["--model-overrides", "{'eval_memory': 40}"]
    assert evaluate(trained, capsys, *options)[0] == 0
