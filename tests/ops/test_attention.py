import pytest
import torch

from fairseq_sha.ops import attend, attend_reference
from fairseq_sha.ops.attention import attend_fused


def by_hand(queries, keys, values):
    """One position and stream at a time."""
    length, streams, width = queries.shape
    memory = len(keys) - length
    out = torch.zeros_like(queries)
    for t in range(length):
        for b in range(streams):
            seen = slice(0, memory + t + 1)
            scores = keys[seen, b] @ queries[t, b] / width**0.5
            out[t, b] = scores.softmax(0) @ values[seen, b]
    return out


def tensors(memory, length=5, streams=3, width=8):
    shapes = [(length, streams, width), *[(memory + length, streams, width)] * 2]
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("memory", [0, 1, 9])
@pytest.mark.parametrize("form", [attend, attend_fused, attend_reference])
def test_equals_the_definition_in_value_and_gradient(form, memory):
    inputs = tensors(memory)
    expected, actual = by_hand(*inputs), form(*inputs)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )


def test_forms_agree_without_gradient():
    inputs = [tensor.float() for tensor in tensors(memory=9)]
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), attend_reference(*inputs))


def test_dropout_is_not_renormalised():
    queries, keys, values = tensors(memory=20)
    mean = torch.stack([attend(queries, keys, values, p=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(queries, keys, values), atol=0.05, rtol=0)
    ones = torch.ones_like(values)
    totals = attend(queries, keys, ones, p=0.3)
    assert (totals - 1).abs().max() > 0.1
