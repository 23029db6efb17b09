"""SHA-RNN against numbers that the author's published code produced, and against itself."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.sha_rnn import SHARNNConfig, SHARNNDecoder
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import VOCABULARY, check_one_token_at_a_time, randomise, record_dropout

CASES = golden_cases("sha_rnn")
FAMILY = FAMILIES["sha_rnn"]


def config(**fields):
    return OmegaConf.structured(SHARNNConfig(**fields))


def decoder(vocabulary=29, **fields):
    small = dict(width=24, window=14, dropout_input=0, dropout_hidden=0, dropout_output=0)
    return SHARNNDecoder(config(**{**small, **fields}), dictionary_of(vocabulary))


def golden_decoder(case):
    return golden.build(FAMILY, SHARNNDecoder, case, window=int(case["window"]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_equals_published_code(name, training):
    case = CASES[name]
    model = golden_decoder(case).train(training)
    pieces = golden.segments(case["tokens"].t(), case["segments"])
    for i, (tokens, targets) in enumerate(pieces):
        model.zero_grad()
        logits, _ = model(tokens, segment=f"train:1:{i}")
        torch.testing.assert_close(logits.transpose(0, 1), case[f"logits{i}"], atol=1e-4, rtol=0)
        loss = golden.token_losses(logits, targets).mean()
        torch.testing.assert_close(loss, case[f"loss{i}"].reshape(()), atol=1e-4, rtol=0)
        loss.backward()

    golden.check_gradients(model, case, FAMILY)
    state = model.carried.training_state()["state"] if training else None
    for layer, kept in enumerate(state or []):
        for key in ("h", "c"):
            torch.testing.assert_close(kept[key], case[f"hidden/{layer}/{key}"], atol=1e-4, rtol=0)
        assert ("memory" in kept) == (f"memory/{layer}" in case)
        if "memory" in kept:
            torch.testing.assert_close(kept["memory"], case[f"memory/{layer}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name, millions, uncollapsed_millions",
    [
        ("sha_lstm_enwik8", 50.62, 50.62),
        ("sha_rnn_enwik8", 51.67, 53.77),
        ("sha_rnn_enwik8_full", 54.85, 63.25),
    ],
)
def test_parameter_counts_of_the_paper(name, millions, uncollapsed_millions):
    cfg = FAMILY.architectures[name]
    for collapse, expected in ((True, millions), (False, uncollapsed_millions)):
        with torch.device("meta"):
            model = SHARNNDecoder(OmegaConf.structured(cfg(collapse=collapse)), dictionary_of(205))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(expected, abs=0.01)


def test_collapsing_changes_no_output():
    full = randomise(decoder(attention_layers=[0, 2])).eval()
    collapsed = decoder(attention_layers=[0, 2], collapse=True).eval()
    weights = full.state_dict()
    for layer in (0, 2):
        name = f"layers.{layer}.attention.value_gate"
        collapsed.layers[layer].attention.value_gate.upgrade_state_dict_named(weights, name)
    collapsed.load_state_dict(weights)
    tokens = torch.randint(29, (3, 20))
    torch.testing.assert_close(collapsed(tokens)[0], full(tokens)[0])


def test_usual_feed_forward_layer_is_that_of_transformers():
    model = randomise(decoder(attention_layers=[], num_layers=1, feed_forward="full")).eval()
    weights, layer = dict(model.named_parameters()), model.layers[0]
    assert layer.boom.linear1.out_features == 4 * 24
    h = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(1))
    out, _ = layer(h, {}, SimpleNamespace(training=False))
    after_cell, _ = layer.cell(layer.norm_start(h), {})
    wide = layer.norm_boom(after_cell) @ weights["layers.0.boom.linear1.weight"].t()
    wide = wide + weights["layers.0.boom.linear1.bias"]
    wide = wide / (1 + torch.exp(-1.702 * wide)) @ weights["layers.0.boom.linear2.weight"].t()
    expected = layer.norm_residual(after_cell) + wide + weights["layers.0.boom.linear2.bias"]
    torch.testing.assert_close(out, expected)


def test_half_the_width_makes_the_usual_layer_as_large_as_boom():
    def count(**fields):
        return sum(p.numel() for p in decoder(width=256, **fields).parameters())

    boom, full = count(), count(feed_forward="full", boom_multiple=2)
    assert full == pytest.approx(boom, rel=0.001)


@pytest.mark.parametrize("cell", ["lstm", "layer_norm_lstm", "sru", "min_gru", "min_lstm", "qrnn"])
def test_one_token_at_a_time_equals_the_segment_pass(cell):
    model = randomise(decoder(attention_layers=[1, 2], window=20, cell=cell)).eval()
    check_one_token_at_a_time(model, 20)


def test_generation_follows_the_order_of_beams():
    model = randomise(decoder()).eval()
    tokens = torch.randint(29, (3, 6))
    order = torch.tensor([2, 0, 0])
    state, expected = {}, None
    for t in range(5):
        model(tokens[:, : t + 1], incremental_state=state)
    model.reorder_incremental_state_scripting(state, order)
    reordered = torch.cat([tokens[order, :5], tokens[:, 5:]], 1)
    logits, _ = model(reordered, incremental_state=state)
    expected = model(reordered)[0]
    torch.testing.assert_close(logits[:, 0], expected[:, -1])
    before = model.get_generation_state(state)
    model.reorder_incremental_state_scripting(state, torch.arange(3))
    for layer, same in zip(model.get_generation_state(state), before):
        assert all(layer[name] is same[name] for name in same)  # without a copy


def test_segment_longer_than_the_window_sees_no_more_than_it():
    """It gives what segments of the window's length give."""
    model = randomise(decoder(attention_layers=[1, 3], window=8)).eval()
    keys = []
    for layer in (1, 3):
        model.layers[layer].attention.register_forward_pre_hook(
            lambda _, inputs: keys.append(
                len(inputs[1]) + len(inputs[2] if inputs[2] is not None else ())
            )
        )
    tokens = torch.randint(29, (2, 40))
    whole = model(tokens)[0]
    assert max(keys) == 8
    pieces = [model(tokens[:, i : i + 8], segment=f"valid:1:{i // 8}")[0] for i in range(0, 40, 8)]
    torch.testing.assert_close(whole, torch.cat(pieces, 1))


def test_memory_is_bounded_by_the_window_and_detached():
    model = decoder(attention_layers=[2], window=10)
    for index in range(4):
        logits, _ = model(torch.randint(29, (2, 7)), segment=f"train:1:{index}")
        logits.sum().backward()  # would fail through the graph of the segment before
        kept = model.carried._latest["train", True].state
        assert len(kept[2]["memory"]) == min(7 * (index + 1), 10)
        assert not any(tensor.requires_grad for layer in kept for tensor in layer.values())


def test_evaluation_has_no_elementwise_operation_over_the_window():
    """Key and value gates must be folded: only products, and one concatenation, have its size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    window, streams, width = 64, 3, 24
    model = randomise(decoder(attention_layers=[2], window=window)).eval()
    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            first = out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(first, torch.Tensor) and first.numel() >= window * streams * width:
                if not func.is_view:
                    seen.add(func.overloadpacket.__name__)
            return out

    with torch.no_grad():
        for index in range(16):
            model(torch.randint(29, (streams, 8)), segment=f"test:1:{index}")
        with Record():
            model(torch.randint(29, (streams, 8)), segment="test:1:16")
    assert "cat" in seen and seen <= {"cat", "clone"}, seen


def test_dropout_acts_in_training_only():
    model = randomise(decoder(dropout_hidden=0.5, dropout_embedding=0.2))
    tokens = torch.randint(29, (3, 20))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_starts_as_the_published_code_does():
    """Layer norms drawn like linear weights would make training stall."""
    width = 256
    model = SHARNNDecoder(config(width=width, attention_layers=[1]), dictionary_of(VOCABULARY))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-12
        elif isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            assert module.weight.std().item() == pytest.approx(0.1 / width**0.5, rel=0.05)
            assert abs(module.weight.mean().item()) < 1e-3
            assert getattr(module, "bias", None) is None or (module.bias == 0).all()
        elif isinstance(module, torch.nn.LSTM):
            for parameter in module.parameters():
                assert 0.9 < parameter.abs().max() * width**0.5 <= 1
    head = model.layers[1].attention
    for gate in (head.query_gate, head.key_gate, head.value_gate.seed, model.head.bias):
        assert (gate == 0).all()


def test_memory_costs_no_gradient():
    """What backward computes for rows of the memory would be thrown away."""
    model = decoder(num_layers=1, attention_layers=[0], window=40)
    for i in range(2):
        model(torch.randint(29, (2, 8)), segment=f"train:1:{i}")
    shapes = []

    def record(module, inputs, output):
        shapes.extend(tuple(x.shape) for x in inputs if torch.is_tensor(x) and x.requires_grad)

    model.layers[0].attention.register_forward_hook(record)
    model(torch.randint(29, (2, 8)), segment="train:1:2")
    assert shapes == [(8, 2, 24)] * 2  # not the memory's 16 rows


def test_dropout_falls_where_the_paper_has_it(monkeypatch):
    """Which tensors are dropped, and with which probability, in the order of computation."""
    length, streams, width, memory = 5, 2, 24, 9
    modules = ("models.sha_rnn", "models.segment_decoder", "modules.boom", "ops.attention")
    seen = record_dropout(monkeypatch, *modules, "modules.single_head_attention")

    narrow, remembered = (length, streams, width), (memory, streams, width)
    boom = [((length, streams, 4, width), 0.2), (narrow, 0.2)]
    plain = [(narrow, 0.2), *boom]  # the LSTM's output, boom's wide layer, boom's output
    # The LSTM's output, queries, values of the segment and of the memory, weights, the mix.
    attending = [(narrow, 0.2), (narrow, 0.2), (narrow, 0.2), (remembered, 0.2)]
    attending += [((streams, length, memory + length), 0.2), (narrow, 0.2), *boom]
    expected = [(narrow, 0.1), *plain, *attending, (narrow, 0.3)]

    model = decoder(
        num_layers=2,
        attention_layers=[1],
        dropout_input=0.1,
        dropout_hidden=0.2,
        dropout_output=0.3,
    )
    model(torch.randint(29, (streams, memory)), segment="train:1:0")
    seen.clear()
    tokens = torch.randint(29, (streams, length))
    model(tokens, segment="train:1:1")
    assert seen == expected
    seen.clear()
    model.eval()(tokens)
    assert seen == []


def test_embedding_dropout_drops_whole_rows():
    model = decoder(dropout_embedding=0.5)
    embedded = model.embed(torch.arange(29).repeat(4, 1), training=True)
    zero = (embedded == 0).all(-1)
    assert zero.any() and not zero.all()
    assert (zero == zero[:1]).all()  # the same rows wherever the token stands


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(window=0), "--window"),
        (dict(num_layers=0, attention_layers=[]), "--num-layers"),
        (dict(dropout_hidden=-0.1), "--dropout-hidden"),
        (dict(dropout_input=1.0), "--dropout-input"),
        (dict(attention_layers=[4]), "--attention-layers"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)


def test_plain_value_gate():
    model = decoder(value_gate="plain")
    names = [name for name, _ in model.named_parameters() if "value_gate" in name]
    assert names == ["layers.2.attention.value_gate"]
    model(torch.randint(29, (2, 5)))[0].sum().backward()
    assert model.layers[2].attention.value_gate.grad is not None
