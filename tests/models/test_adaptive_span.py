"""Adaptive Span against numbers of the published implementation, and against itself."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.adaptive_span import AdaptiveSpanConfig, AdaptiveSpanDecoder
from fairseq_sha.models.family import FAMILIES
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden, helpers
from tests.models.helpers import check_cuts, check_one_token_at_a_time, record_dropout

CASES = golden_cases("adaptive_span")
FAMILY = FAMILIES["adaptive_span"]


def decoder(vocabulary=29, **fields):
    small = dict(width=16, num_layers=2, n_head=2, d_inner=40, attn_span=20, adapt_span_ramp=4)
    cfg = OmegaConf.structured(AdaptiveSpanConfig(**{**small, "dropout": 0, **fields}))
    return AdaptiveSpanDecoder(cfg, dictionary_of(vocabulary))


def randomise(model):
    helpers.randomise(model)
    for layer in model.layers:
        torch.nn.init.uniform_(layer.attention.span)
    return model


def golden_decoder(case):
    return golden.build(
        FAMILY,
        AdaptiveSpanDecoder,
        case,
        adapt_span_ramp=int(case["setting/ramp"]),
        adapt_span_loss=float(case["setting/loss_coeff"]),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name):
    case = CASES[name]
    model = golden_decoder(case)
    for i, (tokens, targets) in enumerate(golden.segments(case["tokens"], case["segments"])):
        model.zero_grad()
        nll, extra = model(tokens, segment=f"train:1:{i}", targets=targets)
        torch.testing.assert_close(nll, case[f"nll{i}"], atol=1e-4, rtol=0)
        span_loss = extra["auxiliary_losses"]["span_loss"]
        torch.testing.assert_close(span_loss, case[f"span_loss{i}"].reshape(()))
        (nll.mean() + span_loss).backward()
    golden.check_gradients(model, case, FAMILY)


def test_a_golden_case_is_trimmed():
    assert any(any(golden_decoder(case).trimmed()) for case in CASES.values())


@pytest.mark.parametrize(
    "span, ramp, longest, trimmed",
    [
        (1024, 32, 0.0, 960),
        (1024, 32, 0.2, 768),
        (1024, 32, 0.2199, 704),  # ceil(225.2) + 32 = 258 keys: four times 64 do not hold them
        (1024, 32, 1.0, 0),
        (129, 1, 0.0, 128),
        (64, 1, 0.0, 0),  # at least one key stays, and 64 are dropped at a time
        (20, 40, 0.0, 0),
    ],
)
def test_trimming(span, ramp, longest, trimmed):
    attention = decoder(attn_span=span, adapt_span_ramp=ramp).layers[0].attention
    assert attention.trim(longest) == trimmed


@pytest.mark.parametrize("name, millions", [("adaptive_span_enwik8", 38.54)])
def test_counted_parameters(name, millions):
    assert count(name) == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    "name, millions", [("adaptive_span_enwik8", 39), ("adaptive_span_enwik8_large", 209)]
)
def test_parameter_counts_of_the_paper(name, millions):
    assert count(name) == pytest.approx(millions, rel=0.015)


def count(name):
    cfg = FAMILY.architectures[name]
    with torch.device("meta"):
        model = AdaptiveSpanDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    return sum(p.numel() for p in model.parameters()) / 1e6


def by_hand(attention, h, cache, key_positions):
    """The equations for one stream, one query and head at a time, nothing trimmed."""
    rows = torch.cat([cache, h])
    d = h.size(1) // attention.n_head
    mixed = torch.zeros_like(h)
    j = torch.arange(attention.attn_span)
    for t in range(len(h)):
        seen = rows[t : t + attention.attn_span]
        for head in range(attention.n_head):
            part = slice(head * d, (head + 1) * d)
            q = attention.query(h[t])[part]
            scores = attention.key(seen)[:, part] @ q + q @ key_positions
            reach = j - (attention.attn_span - 1) + attention.span[head] * attention.attn_span
            a = (scores / d**0.5).softmax(0) * (reach / attention.ramp + 1).clamp(0, 1)
            a = a / (a.sum() + 1e-8)
            mixed[t, part] = a @ attention.value(seen)[:, part]
    return attention.output(mixed)


@pytest.mark.parametrize("span", [20, 150])
def test_attention_equals_the_equations(span):
    model = randomise(decoder(attn_span=span))
    attention = model.layers[0].attention
    with torch.no_grad():
        attention.span.mul_(0.4)  # so that something is trimmed of 150
    positions, trimmed = model.key_positions, model.trimmed()[0]
    assert trimmed == (64 if span == 150 else 0)
    h, cache = torch.randn(7, 3, 16, requires_grad=True), torch.randn(span, 3, 16)
    own, remembered = (attention.keys_and_values(part) for part in (h, cache[trimmed:]))
    actual = attention(h, own, remembered, positions, trimmed, training=False)
    expected = torch.stack(
        [by_hand(attention, h[:, b], cache[:, b], model.key_positions) for b in range(3)], 1
    )
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    inputs = [h, model.key_positions, *attention.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        atol=1e-4,
        rtol=1e-4,
    )


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder()).eval(), 30)  # longer than the span


def test_cutting_otherwise_changes_nothing():
    check_cuts(randomise(decoder()).eval(), [60], [7, 13, 40], [1] * 60)


def test_position_does_not_attend_to_itself_nor_beyond_its_span():
    model = randomise(decoder(num_layers=1, attn_span=8))
    attention = model.layers[0].attention
    with torch.no_grad():
        attention.span.fill_(1.0)
    h, cache = torch.randn(12, 1, 16), torch.randn(8, 1, 16)
    rows = torch.cat([cache, h]).requires_grad_()
    value = attention.value(rows)
    gradient = torch.autograd.grad(value.sum(), rows)  # the graph reaches the rows at all
    assert gradient[0].any()
    query = 9
    own, remembered = (attention.keys_and_values(part) for part in (rows[8:], rows[:8]))
    mixed = attention(rows[8:], own, remembered, model.key_positions, 0, training=False)
    mixed = mixed[query].sum()
    (gradient,) = torch.autograd.grad(mixed, rows)
    reached = gradient[:, 0].abs().sum(-1) > 0
    # Itself counts through its query alone.
    assert reached.nonzero().flatten().tolist() == list(range(query, query + 8 + 1))


def test_cache_is_bounded_and_detached():
    model = decoder()
    for index in range(4):
        logits, _ = model(torch.randint(29, (2, 7)), segment=f"train:1:{index}")
        logits.sum().backward()  # would fail through the graph of the segment before
        kept = model.carried._latest["train", True].state
        assert [len(layer["cache"]) for layer in kept] == [20, 20]
        assert not any(layer["cache"].requires_grad for layer in kept)


def test_evaluation_remembers_what_heads_reach_only():
    segments = torch.randint(29, (2, 150)).split([60, 7, 83], 1)
    model = randomise(decoder(attn_span=200))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.span.copy_(torch.tensor([0.0, 0.2]))  # 40 tokens and the ramp's 4
    expected = [model(tokens, segment=f"train:1:{i}")[0] for i, tokens in enumerate(segments)]
    model.eval()
    for i, tokens in enumerate(segments):
        with torch.no_grad():
            logits, _ = model(tokens, segment=f"valid:1:{i}")
        torch.testing.assert_close(logits, expected[i])
        kept = model.carried._latest["valid", False].state
        assert [len(rows) for layer in kept for rows in layer.values()] == [72] * 4
    check_cuts(model, [150], [60, 90], [7] * 21 + [3])


def test_dropout_falls_where_the_paper_has_it(monkeypatch):
    modules = ("models.adaptive_span", "models.segment_decoder", "modules.feed_forward")
    seen = record_dropout(monkeypatch, *modules)
    model = decoder(num_layers=1, dropout=0.2)
    model(torch.randint(29, (3, 5)))
    assert seen == [((2 * 3, 5, 20 + 5 - 1), 0.2), ((5, 3, 40), 0.2)]
    seen.clear()
    model.eval()(torch.randint(29, (3, 5)))
    assert seen == []


def test_initial_weights_are_the_published_ones():
    model = decoder(vocabulary=200, width=256, attn_span=512, adapt_span_init=0.25)
    for normal in (model.embedding.weight, model.key_positions):
        assert normal.mean().item() == pytest.approx(0, abs=0.02)
        assert normal.std().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(model.spans(), torch.full((2, 2), 0.25))
    uniform = 256**-0.5  # torch's bound for linear maps
    for weight in (model.head.weight, model.head.bias, model.layers[1].attention.key.weight):
        assert 0.9 * uniform < weight.abs().max() <= uniform


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mask_and_losses_stand_half_precision(dtype):
    """Spans of thousands of tokens, and their sum over layers, in numbers of few digits."""
    model = decoder(attn_span=8192, num_layers=12, adapt_span_init=0.9, adapt_span_loss=1.0)
    expected = model.layers[0].attention.mask(0)
    loss = model.auxiliary_losses(None, None)["span_loss"]
    model.to(dtype)
    rounded = model.layers[0].attention.span[0].float() * 8192
    mask = model.layers[0].attention.mask(0)
    assert mask.dtype == torch.float32 and len(mask.unique()) >= len(expected.unique()) - 1
    assert 8192 - int((mask[0] == 0).sum()) == pytest.approx(float(rounded) + 32 * 4 / 32, abs=2)
    halved = model.auxiliary_losses(None, None)["span_loss"]
    torch.testing.assert_close(halved, loss, rtol=0.01, atol=0)
    assert model.statistics()["span_max"] * 512 * 64 > 65504  # the type of fp16 would overflow


def test_auxiliary_losses_are_for_training_only():
    model = decoder(adapt_span_init=0.5)
    tokens = torch.randint(29, (3, 5))
    _, extra = model(tokens, targets=tokens)
    assert float(extra["statistics"]["span_mean"]) == pytest.approx(10)
    assert model.eval()(tokens, targets=tokens)[1] == {}


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(n_head=3), "--n-head"),
        (dict(num_layers=0), "--num-layers"),
        (dict(attn_span=0), "--attn-span"),
        (dict(adapt_span_ramp=0), "--adapt-span-ramp"),
        (dict(adapt_span_loss=-1.0), "--adapt-span-loss"),
        (dict(adapt_span_init=1.5), "--adapt-span-init"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
