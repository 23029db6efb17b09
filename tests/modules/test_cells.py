"""Recurrent cells against golden numbers, torch, and their equations."""

import pytest
import torch

from fairseq_sha.modules import LSTM, SRU, LayerNormLSTM, MinGRU, MinLSTM
from tests.conftest import golden_cases

CASES = golden_cases("min_rnn")
CELLS = {
    "lstm": LSTM,
    "layer_norm_lstm": LayerNormLSTM,
    "sru": SRU,
    "min_gru": MinGRU,
    "min_gru, expanded": lambda width: MinGRU(width, 1.5),
    "min_lstm": MinLSTM,
}


def golden_cell(name):
    case = CASES[name]
    names = {"to_hidden_and_gate": "input", "to_hidden_and_f_i_gate": "input", "to_out": "output"}
    weights = {}
    for key, value in case.items():
        if key.startswith("param/"):
            module, kind = key[len("param/") :].rsplit(".", 1)
            weights[f"{names[module]}.{kind}"] = value
    width = case["input"].size(-1)
    expansion = case["last_hidden"].size(-1) / width
    cell = (MinLSTM if name.startswith("min_lstm") else MinGRU)(width, expansion)
    cell.load_state_dict(weights)
    return cell, {
        f"{names[k.split('/')[1].split('.')[0]]}.weight": v
        for k, v in case.items()
        if k.startswith("grad/")
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_recurrence(name):
    case = CASES[name]
    cell, gradients = golden_cell(name)
    x = case["input"].transpose(0, 1)
    out, state = cell(x, {})
    torch.testing.assert_close(out.transpose(0, 1), case["output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(state["h"][0], case["last_hidden"], atol=1e-4, rtol=0)
    out.pow(2).mean().backward()
    own = {key: p.grad for key, p in cell.named_parameters()}
    assert set(own) == set(gradients)
    for key, gradient in own.items():
        bound = 1e-3 * gradients[key].abs().max() + 1e-8
        assert (gradient - gradients[key]).abs().max() <= bound, key


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_recurrence_when_cut(name):
    case = CASES[name]
    cell, _ = golden_cell(name)
    outputs, state = [], {}
    for piece in case["input"].transpose(0, 1).split([int(n) for n in case["segments"]]):
        out, state = cell(piece, state)
        outputs.append(out)
    out = torch.cat(outputs).transpose(0, 1)
    torch.testing.assert_close(out, case["output"], atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("cell", [MinGRU, MinLSTM])
def test_state_decays_in_half_precision_too(cell):
    """A gate that keeps 99.9 % would be 1 in bfloat16, and the state a sum without end."""
    cell = cell(1).to(torch.bfloat16)
    rows = [0.5, -6.9] if cell.gates == 1 else [0.5, 0.0, -6.9]  # candidate and gates
    with torch.no_grad():
        cell.input.weight.copy_(torch.tensor(rows).unsqueeze(1))
    _, state = cell(torch.ones(20000, 1, 1, dtype=torch.bfloat16), {})
    # keep + take = 1, so the state tends to what is taken, g(0.5) = 1.
    assert state["h"].item() == pytest.approx(1, abs=1e-2)


def test_min_lstm_gates_that_are_both_shut_do_not_divide_by_zero():
    keep, take = MinLSTM(2).keep_and_take(torch.tensor(-300.0), torch.tensor(-301.0))
    assert keep.item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()))
    assert (keep + take).item() == pytest.approx(1)


def test_sru_has_its_maps_one_after_the_other_and_starts_as_the_paper_has_it():
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
    out, left = cell(x, {})
    torch.testing.assert_close(out, torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(left["c"][0], c, atol=1e-5, rtol=1e-4)
