"""The recurrence of the layer-normalised LSTM against its definition."""

import pytest
import torch

from fairseq_sha.ops import layer_norm_lstm
from fairseq_sha.ops.oracles import layer_norm_lstm_reference


def inputs(length, dtype=torch.double, streams=2, width=5):
    rows = 4 * width
    shapes = [(length, streams, rows), (streams, width), (streams, width), (rows, width)]
    shapes += [(rows,), (rows,), (width,), (width,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(form, tensors, weights):
    """Outputs and the gradients of all inputs, through all h and the last h and c."""
    *first, gain, bias, cell_gain, cell_bias = tensors
    outputs = form(*first, (gain, bias), (cell_gain, cell_bias))
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.double, 1e-10), (torch.float, 1e-4)])
def test_equals_its_definition(length, dtype, tolerance):
    tensors = inputs(length, dtype)
    weights = [torch.randn(shape, dtype=dtype) for shape in ((length, 2, 5), (2, 5), (2, 5))]
    actual = run(layer_norm_lstm, tensors, weights)
    expected = run(layer_norm_lstm_reference, tensors, weights)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_equals_its_definition_without_gradient():
    *first, gain, bias, cell_gain, cell_bias = inputs(4)
    arguments = [*first, (gain, bias), (cell_gain, cell_bias)]
    torch.testing.assert_close(layer_norm_lstm(*arguments), layer_norm_lstm_reference(*arguments))


def test_inputs_in_half_precision_have_a_state_in_float32():
    tensors = inputs(6)
    weights = [torch.randn(shape) for shape in ((6, 2, 5), (2, 5), (2, 5))]
    half = [t.detach().bfloat16().requires_grad_() for t in tensors]
    exact = [t.detach().float().requires_grad_() for t in half]
    actual, expected = (run(layer_norm_lstm, t, weights) for t in (half, exact))
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == actual[2].dtype == torch.float32
    for ours, theirs in zip(actual, expected):
        assert (ours.float() - theirs).abs().max() <= 2e-2 * theirs.abs().max()
