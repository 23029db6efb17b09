"""Transformer-XL against numbers of the published implementation, and against itself."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.transformer_xl import TransformerXLConfig, TransformerXLDecoder
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import check_cuts, check_one_token_at_a_time, randomise, record_dropout

CASES = golden_cases("transformer_xl")
FAMILY = FAMILIES["transformer_xl"]


def decoder(vocabulary=29, **fields):
    small = dict(width=16, num_layers=2, n_head=2, d_inner=40, mem_len=9, dropout=0)
    cfg = OmegaConf.structured(TransformerXLConfig(**{**small, **fields}))
    return TransformerXLDecoder(cfg, dictionary_of(vocabulary))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_equals_published_code(name, training):
    case = CASES[name]
    model = golden.build(
        FAMILY,
        TransformerXLDecoder,
        case,
        mem_len=int(case["setting/mem_len"]),
        clamp_len=max(int(case["setting/clamp_len"]), 0),
        same_length=bool(case["setting/same_length"]),
    ).train(training)
    pieces = list(golden.segments(case["tokens"].t(), case["segments"]))
    for i, (tokens, targets) in enumerate(pieces):
        with torch.no_grad():  # the fused form; in evaluation, with keys and values that are kept
            nll = golden.token_losses(model(tokens, segment=f"valid:1:{i}")[0], targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
    for i, (tokens, targets) in enumerate(pieces):
        model.zero_grad()
        nll = golden.token_losses(model(tokens, segment=f"train:1:{i}")[0], targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
        nll.mean().backward()
    golden.check_gradients(model, case, FAMILY)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("transformer_xl_enwik8_12l", 41),
        ("transformer_xl_enwik8_18l", 88),
        ("transformer_xl_enwik8_24l", 277),
    ],
)
def test_parameter_counts_of_the_paper(name, millions):
    cfg = FAMILY.architectures[name]
    with torch.device("meta"):
        model = TransformerXLDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.015 if millions != 88 else 0.01)


def by_hand(model, tokens):
    """The paper's equations for a whole text without memory, one query and key at a time."""
    h = model.embedding(tokens) * model.embedding.embedding_dim**0.5
    for layer in model.layers:
        attention = layer.attention
        own = model if model.content_bias is not None else attention
        u, w = own.content_bias, own.position_bias
        wq, wk, wv = attention.query_key_value.weight.chunk(3)
        mixed = torch.zeros_like(h)
        for i in range(len(h)):
            for head in range(attention.n_head):
                d = h.size(1) // attention.n_head
                rows = slice(head * d, (head + 1) * d)
                q = wq[rows] @ h[i]
                scores = []
                for j in range(i + 1):
                    steps = torch.arange(0, h.size(1), 2) / h.size(1)
                    distance = min(i - j, model.clamp_len or i - j)
                    angles = distance * 10000**-steps
                    position = torch.cat([angles.sin(), angles.cos()])
                    r = attention.position.weight[rows] @ position
                    scores.append((q + u[head]) @ (wk[rows] @ h[j]) + (q + w[head]) @ r)
                scores = torch.stack(scores) / d**0.5
                if attention.same_length:
                    scores[: max(i + 1 - attention.same_length, 0)] = float("-inf")
                values = h[: i + 1] @ wv[rows].t()
                mixed[i, rows] = scores.softmax(0) @ values
        h = layer.norm_attention(h + attention.output(mixed))
        h = layer.norm_feed_forward(h + layer.feed_forward(h, False))
    return model.head.logits(h)


@pytest.mark.parametrize(
    "fields", [dict(), dict(clamp_len=3), dict(same_length=True, mem_len=5), dict(untie_r=True)]
)
@torch.no_grad()
def test_equals_the_equations(fields):
    model = randomise(decoder(**fields)).eval()
    tokens = torch.randint(29, (12,))
    torch.testing.assert_close(model(tokens[None])[0][0], by_hand(model, tokens))


def test_untied_biases_add_a_pair_for_each_layer():
    """The published counts of Transformer-XL's TensorFlow weights include them."""
    cfg = FAMILY.architectures["transformer_xl_wt103_large"]
    with torch.device("meta"):
        tied, untied = (
            TransformerXLDecoder(OmegaConf.structured(cfg(untie_r=untie)), dictionary_of(267_735))
            for untie in (False, True)
        )
    more = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert more == 17 * 2 * 16 * 64 == 34_816


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder(mem_len=20)).eval(), 20)


def test_gradients_of_one_token_equal_those_in_a_longer_segment():
    """One token's product with the positions is computed in another order."""
    model = randomise(decoder(mem_len=20))
    tokens = torch.randint(29, (9, 3))
    gradients = []
    for end in (8, 9):
        _, state = model.read(tokens[:7], None)
        features, _ = model.read(tokens[7:end], state)
        gradients.append(torch.autograd.grad(features[0].square().sum(), model.layers.parameters()))
    torch.testing.assert_close(*gradients)


def test_cutting_otherwise_changes_nothing_when_every_query_sees_as_much():
    """With same_length, what a position sees does not depend on where segments begin."""
    model = randomise(decoder(mem_len=6, same_length=True)).eval()
    check_cuts(model, [24], [7, 9, 8], [5, 5, 5, 5, 4], [1] * 24)


@pytest.mark.parametrize("mem_len", [0, 1, 10])
def test_memory_is_bounded_and_detached(mem_len):
    model = decoder(mem_len=mem_len)
    for index in range(4):
        logits, _ = model(torch.randint(29, (2, 7)), segment=f"train:1:{index}")
        logits.sum().backward()  # would fail through the graph of the segment before
        kept = model.carried._latest["train", True].state
        assert [len(layer["memory"]) for layer in kept] == [min(7 * (index + 1), mem_len)] * 2
        assert not any(layer["memory"].requires_grad for layer in kept)
        for layer in kept:  # no rows behind a view
            assert layer["memory"].untyped_storage().nbytes() == 4 * layer["memory"].numel()
    model.eval()
    for index in range(4):
        with torch.no_grad():
            model(torch.randint(29, (2, 7)), segment=f"valid:1:{index}")
        for layer in model.carried._latest["valid", False].state:
            rows = {key: len(tensor) for key, tensor in layer.items()}
            assert rows == dict.fromkeys(("keys", "values"), min(7 * (index + 1), mem_len))


def test_dropout_acts_in_training_only():
    for fields in (dict(dropout=0.3), dict(dropatt=0.3)):
        model = randomise(decoder(**fields))
        tokens = torch.randint(29, (3, 20))
        assert not torch.equal(model(tokens)[0], model(tokens)[0])
        model.eval()
        assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_dropout_falls_where_the_paper_has_it(monkeypatch):
    modules = ("models.transformer_xl", "models.segment_decoder", "modules.feed_forward")
    seen = record_dropout(monkeypatch, *modules, "ops.attention")
    length, streams, memory = 5, 3, 4
    narrow, inner = ((length, streams, 16), 0.1), ((length, streams, 40), 0.1)
    model = decoder(num_layers=1, dropout=0.1, dropatt=0.2, mem_len=memory)
    model(torch.randint(29, (streams, memory)), segment="train:1:0")
    seen.clear()
    model(torch.randint(29, (streams, length)), segment="train:1:1")
    total = length + memory
    positions, weights = ((total + 1, 16), 0.1), ((2 * streams, length, total), 0.2)
    assert seen == [narrow, positions, weights, narrow, inner, narrow, narrow]


def test_initial_weights_have_the_published_spread():
    model = decoder(width=256, d_inner=512)
    linear = model.layers[0].feed_forward.linear1
    norms = torch.cat([m.weight for m in model.modules() if isinstance(m, torch.nn.LayerNorm)])
    attention = model.layers[1].attention
    drawn = [linear.weight, attention.query_key_value.weight, attention.position.weight]
    drawn += [model.embedding.weight, model.content_bias, model.position_bias, norms - 1]
    for tensor in drawn:
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
    assert not linear.bias.any() and not model.head.bias.any()


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(n_head=3), "--n-head"),
        (dict(width=15, n_head=3), "--width 15"),
        (dict(num_layers=0), "--num-layers"),
        (dict(mem_len=-1), "--mem-len"),
        (dict(mem_len=0, same_length=True), "--mem-len 0"),
        (dict(clamp_len=-1), "--clamp-len"),
        (dict(dropout=1.0), "--dropout"),
        (dict(dropatt=-0.5), "--dropatt"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
