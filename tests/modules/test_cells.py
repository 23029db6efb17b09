"""Recurrent cells against golden numbers, torch, and their equations."""

from copy import deepcopy

import pytest
import torch

from fairseq_sha.modules import (
    LSTM,
    QRNN,
    SRU,
    LayerNormLSTM,
    MinGRU,
    MinLSTM,
    OverparameterisedVector,
)
from fairseq_sha.ops import dropout
from tests.conftest import golden_cases

CASES = golden_cases("min_rnn")
CELLS = {
    "lstm": LSTM,
    "layer_norm_lstm": LayerNormLSTM,
    "sru": SRU,
    "min_gru": MinGRU,
    "min_gru, expanded": lambda width: MinGRU(width, 1.5),
    "min_lstm": MinLSTM,
    "qrnn": QRNN,
    "qrnn, window 1": lambda width: QRNN(width, window=1),
    "qrnn, no output gate": lambda width: QRNN(width, output_gate=False),
}


# Our name of each linear map of the published code; the first one also tells which cell it is.
PUBLISHED_NAMES = {
    "to_hidden_and_gate": "input",
    "to_hidden_and_f_i_gate": "input",
    "to_out": "output",
}


def tensors(case, kind):
    """The parameters of a golden case, or their gradients, under our names."""
    found = {}
    for key, value in case.items():
        if key.startswith(f"{kind}/"):
            name, suffix = key[len(f"{kind}/") :].rsplit(".", 1)
            found[f"{PUBLISHED_NAMES[name]}.{suffix}"] = value
    return found


def golden_cell(case):
    """The cell of a golden case, told by its parameters' names and shapes."""
    cell = MinLSTM if "param/to_hidden_and_f_i_gate.weight" in case else MinGRU
    width, state_width = case["input"].size(-1), case["last_hidden"].size(-1)
    # The width of the state is rounded down, hence the half.
    cell = cell(width, 1 if state_width == width else (state_width + 0.5) / width)
    cell.load_state_dict(tensors(case, "param"))
    return cell


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_recurrence(name):
    case = CASES[name]
    cell, expected = golden_cell(case), tensors(case, "grad")
    out, state = cell(case["input"].transpose(0, 1), {})
    torch.testing.assert_close(out.transpose(0, 1), case["output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(state["h"][0], case["last_hidden"], atol=1e-4, rtol=0)
    out.pow(2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in cell.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        bound = 1e-3 * expected[name].abs().max() + 1e-8
        assert (gradient - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_recurrence_when_cut(name):
    case = CASES[name]
    cell, outputs, state = golden_cell(case), [], {}
    for piece in case["input"].transpose(0, 1).split(case["segments"].tolist()):
        out, state = cell(piece, state)
        outputs.append(out)
    out = torch.cat(outputs).transpose(0, 1)
    torch.testing.assert_close(out, case["output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(state["h"][0], case["last_hidden"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CELLS)
def test_state_goes_on_where_a_segment_ended(name):
    cell = CELLS[name](8)
    x = torch.randn(11, 3, 8)
    whole, last = cell(x, {})
    outputs, state = [], {}
    for piece in x.split([4, 1, 6]):
        out, state = cell(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, last)
    assert all(tensor.size(1) == 3 for tensor in state.values())


def test_lstm_is_torch_s_bit_for_bit():
    torch.manual_seed(3)
    ours = LSTM(8)
    torch.manual_seed(3)
    theirs = torch.nn.LSTM(8, 8)
    x = torch.randn(5, 2, 8)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    out, state = ours(x, {})
    expected, (h, c) = theirs(x)
    assert torch.equal(out, expected) and torch.equal(state["h"], h) and torch.equal(state["c"], c)


def test_lstm_may_have_another_width_inside():
    cell = LSTM(8, 5)
    out, state = cell(torch.randn(4, 3, 8), {})
    assert out.shape == (4, 3, 5) and state["h"].shape == state["c"].shape == (1, 3, 5)


def test_dropped_recurrent_weights_differ_from_the_second_step_on():
    cell, x = LSTM(8, weight_dropout=0.5), torch.randn(5, 3, 8)
    (first, _), (second, _) = (cell(x, {}, training=True) for _ in range(2))
    assert torch.equal(first[0], second[0])  # h_0 is zero, so W_hh does not count yet
    assert ((first[1:] - second[1:]).flatten(1).abs().max(1).values > 1e-3).all()


def test_dropped_recurrent_weights_have_one_mask_for_all_steps_and_streams():
    torch.manual_seed(3)
    dropped = LSTM(8, weight_dropout=0.5)
    plain = deepcopy(dropped)
    plain.weight_dropout = 0.0
    x = torch.randn(5, 3, 8)
    torch.manual_seed(4)
    out, state = dropped(x, {}, training=True)
    torch.manual_seed(4)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(dropout(dropped.weight_hh_l0, 0.5))
    expected, expected_state = plain(x, {}, training=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state)


def test_no_recurrent_weight_is_dropped_in_evaluation():
    cell = LSTM(8, weight_dropout=0.5)
    plain = LSTM(8)
    plain.load_state_dict(cell.state_dict())
    x = torch.randn(5, 3, 8)
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    cell(x, {}, training=True)
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())
    for training in (False, True):
        out, state = cell(x, {}, training=False)
        expected, expected_state = plain(x, {}, training)
        assert torch.equal(out, expected)
        assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_gradient_reaches_the_recurrent_weights_that_were_kept():
    cell, x = LSTM(8, weight_dropout=0.5), torch.randn(5, 3, 8)
    torch.manual_seed(4)
    out, _ = cell(x, {}, training=True)
    out.pow(2).sum().backward()
    torch.manual_seed(4)
    kept = dropout(torch.ones_like(cell.weight_hh_l0), 0.5) != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.equal(cell.weight_hh_l0.grad != 0, kept)
    assert (cell.weight_ih_l0.grad != 0).all()


def layer_norm(x, gain, bias):
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + bias


def test_layer_norm_lstm_equals_its_equations():
    cell = LayerNormLSTM(6)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    x, h, c = torch.randn(1, 2, 6), torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    w = dict(cell.named_parameters())
    gates = sum(
        layer_norm(v @ w[f"{name}.weight"].t(), w[f"norm_{name}.weight"], w[f"norm_{name}.bias"])
        for name, v in (("input", x), ("hidden", h))
    )
    i, f, g, o = gates.unflatten(-1, (4, 6)).unbind(-2)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * layer_norm(new_c, w["norm_cell.weight"], w["norm_cell.bias"]).tanh()
    out, state = cell(x, {"h": h, "c": c})
    torch.testing.assert_close(out, new_h)
    torch.testing.assert_close(state, {"h": new_h, "c": new_c})


QRNN_CASES = golden_cases("qrnn")


@pytest.mark.parametrize("name", [name for name, case in QRNN_CASES.items() if "input" in case])
def test_qrnn_equals_the_published_layer(name):
    """Output, state and gradients, that of the input included, cut as the reference was."""
    case = QRNN_CASES[name]
    width, window = case["input"].size(-1), int(case["setting/window"])
    output_gate = bool(case["setting/output_gate"])
    cell = QRNN(width, case["output0"].size(-1), window, output_gate)
    cell.load_state_dict({f"input.{kind}": case[f"param/linear.{kind}"] for kind in KINDS})
    state = {}
    for i, piece in enumerate(case["input"].split(case["segments"].tolist())):
        piece = piece.clone().requires_grad_()
        state = {key: value.detach() for key, value in state.items()}
        out, state = cell(piece, state)
        torch.testing.assert_close(out, case[f"output{i}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(state["c"][0], case[f"state{i}"], atol=1e-4, rtol=0)
    loss = out.pow(2).mean()
    torch.testing.assert_close(loss, case["loss"], atol=1e-4, rtol=0)
    loss.backward()
    gradients = {f"linear.{kind}": getattr(cell.input, kind).grad for kind in KINDS}
    for key, gradient in {**gradients, "input": piece.grad}.items():
        expected = case[f"grad/{key}"]
        assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-8, key


KINDS = "weight", "bias"


def test_overparameterised_vector_is_the_published_step_of_a_qrnn():
    """A QRNN without output gate, from a state of zeros (SHA-RNN's paper, section 6.4.1)."""
    case = QRNN_CASES["overparam"]
    width = case["param/vs"].numel()
    vector, cell = OverparameterisedVector(width), QRNN(width, window=1, output_gate=False)
    weights = {kind: case[f"param/vq.linear.{kind}"] for kind in KINDS}
    cell.load_state_dict({f"input.{kind}": value for kind, value in weights.items()})
    linear = {f"linear.{kind}": value for kind, value in weights.items()}
    vector.load_state_dict({"seed": case["param/vs"].flatten(), **linear})
    seed = case["param/vs"].clone().requires_grad_()
    step, _ = cell(torch.sigmoid(seed), {})
    steps = {"param": [seed, cell.input.weight, cell.input.bias], "out": step}
    ours = {"param": list(vector.parameters()), "out": vector()}
    names = "vs", "vq.linear.weight", "vq.linear.bias"
    for found in (steps, ours):
        expected = case["output0"].reshape(found["out"].shape)
        torch.testing.assert_close(found["out"], expected, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad(found["out"].pow(2).mean(), found["param"])
        for name, gradient in zip(names, gradients):
            expected = case[f"grad/{name}"].reshape(gradient.shape)
            assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-8, name


def test_dropped_weights_of_a_qrnn_have_one_mask_and_are_whole_in_evaluation():
    cell, x = QRNN(8, weight_dropout=0.5), torch.randn(5, 3, 8)
    torch.manual_seed(4)
    out, _ = cell(x, {}, training=True)
    plain = deepcopy(cell)
    torch.manual_seed(4)
    with torch.no_grad():
        plain.input.weight.copy_(dropout(cell.input.weight, 0.5))
    torch.testing.assert_close(out, plain(x, {})[0])
    whole = QRNN(8)
    whole.load_state_dict(cell.state_dict())
    assert torch.equal(cell(x, {})[0], whole(x, {})[0])


@pytest.mark.parametrize("cell", [MinGRU, MinLSTM])
def test_state_decays_in_half_precision_too(cell):
    """A gate that keeps 99.9 % would be 1 in bfloat16, and the state a sum without end."""
    cell = cell(1).to(torch.bfloat16)
    rows = [0.5, -6.9] if cell.num_gates == 1 else [0.5, 0.0, -6.9]  # candidate and gates
    with torch.no_grad():
        cell.input.weight.copy_(torch.tensor(rows).unsqueeze(1))
    _, state = cell(torch.ones(20000, 1, 1, dtype=torch.bfloat16), {})
    # Both gates sum to 1, so the state tends to g(0.5) = 1.
    assert state["h"].item() == pytest.approx(1, abs=1e-2)


def test_min_lstm_gates_that_are_both_shut_do_not_divide_by_zero():
    f, i = MinLSTM(2).forget_and_input_gates(torch.tensor(-300.0), torch.tensor(-301.0))
    assert f.item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()))
    assert (f + i).item() == pytest.approx(1)


def test_sru_orders_its_maps_and_starts_as_in_the_paper():
    torch.manual_seed(1)
    cell = SRU(300)
    assert cell.weight.min() < -0.9 and cell.weight.max() > 0.9 and cell.weight.abs().max() <= 1
    assert (cell.bias == 0).all()
    torch.nn.init.normal_(cell.bias)
    x = torch.randn(5, 2, 300)
    u0, u1, u2 = (x @ cell.input.weight.t()).chunk(3, -1)
    (v_f, v_r), (b_f, b_r), c, expected = cell.weight, cell.bias, torch.zeros(2, 300), []
    for t in range(5):
        f, r = torch.sigmoid(u1[t] + v_f * c + b_f), torch.sigmoid(u2[t] + v_r * c + b_r)
        c = u0[t] + (c - u0[t]) * f
        expected.append(x[t] + (c - x[t]) * r)
    out, state = cell(x, {})
    torch.testing.assert_close(out, torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state["c"][0], c, atol=1e-5, rtol=1e-4)
