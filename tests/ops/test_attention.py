import sys

import pytest
import torch

from fairseq_sha.ops import attend, causal_bias, causal_relative_bias, skew
from fairseq_sha.ops.attention import attend_fused, attend_unfused
from fairseq_sha.ops.oracles import attend_reference

ATTENTION = sys.modules[attend.__module__]


def tensors(memory, length=5, streams=3, width=8):
    shapes = [(length, streams, width), *[(memory + length, streams, width)] * 2]
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


def check_value_and_gradient(actual, expected, inputs):
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )


def with_memory(queries, keys, values, bias, p=0.0):
    """:func:`attend` with the rows before the segment as its memory."""
    rows = len(keys) - len(queries)
    memory = keys[:rows], values[:rows]
    return attend(queries, keys[rows:], values[rows:], bias[..., rows:], p, memory)


FORMS = [attend, attend_fused, attend_unfused, with_memory]


@pytest.mark.parametrize("memory", [0, 1, 9])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition_in_value_and_gradient(form, memory):
    inputs = tensors(memory)
    bias = causal_bias(*inputs[:2])
    check_value_and_gradient(form(*inputs, bias), attend_reference(*inputs, bias), inputs)


@pytest.mark.parametrize("form", [attend, attend_fused, attend_unfused])
def test_a_bias_of_each_head_counts(form):
    inputs = tensors(memory=4)
    bias = torch.randn(3, 5, 9, dtype=torch.double, requires_grad=True)
    both = bias + causal_bias(*inputs[:2])
    expected = attend_reference(*inputs, both)
    check_value_and_gradient(form(*inputs, both), expected, [*inputs, bias])


@pytest.mark.parametrize("same_length", [1, 3, 50])
@pytest.mark.parametrize("memory", [0, 6])
def test_causal_bias_may_be_a_band(memory, same_length):
    queries, keys = torch.zeros(5, 2, 4), torch.zeros(memory + 5, 2, 4)
    bias = causal_bias(queries, keys, same_length)
    for t in range(5):
        seen = [j for j in range(memory + 5) if 0 <= memory + t - j < same_length]
        assert (bias[t] == 0).nonzero().flatten().tolist() == seen
    assert set(bias.flatten().tolist()) <= {0, float("-inf")}


def test_forms_agree_without_gradient():
    inputs = [tensor.float() for tensor in tensors(memory=9)]
    bias = causal_bias(*inputs[:2])
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs, bias), attend_reference(*inputs, bias))


def test_dropout_is_not_renormalised():
    queries, keys, values = tensors(memory=20)
    bias = causal_bias(queries, keys)
    mean = torch.stack([attend(queries, keys, values, bias, p=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(queries, keys, values, bias), atol=0.05, rtol=0)
    ones = torch.ones_like(values)
    totals = attend(queries, keys, ones, bias, p=0.3)
    assert (totals - 1).abs().max() > 0.1


@pytest.mark.parametrize("same_length", [None, 3, 100])
@pytest.mark.parametrize("memory", [0, 6])
@pytest.mark.parametrize("length", [1, 5])
def test_relative_bias_equals_its_definition(length, memory, same_length):
    streams, heads, width, total = 2, 3, 4, memory + length
    queries = torch.randn(length, streams * heads, width, dtype=torch.double, requires_grad=True)
    positions = torch.randn(total + 1, heads, width, dtype=torch.double, requires_grad=True)
    expected = torch.full((streams * heads, length, total), float("-inf"), dtype=torch.double)
    for n in range(streams * heads):
        for i in range(length):
            for j in range(total):
                distance = memory + i - j
                if 0 <= distance < (same_length or total):
                    r = positions[total - 1 - distance, n % heads]
                    expected[n, i, j] = queries[i, n] @ r
    actual = causal_relative_bias(queries, positions, same_length)
    check_value_and_gradient(actual.softmax(-1), expected.softmax(-1), [queries, positions])
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("length", [1, 4])
def test_skew_shifts_each_row_by_one_more(length):
    scores = torch.randn(3, length, 6, dtype=torch.double, requires_grad=True)
    expected = torch.full((3, length, 6 + length - 1), 0.5, dtype=torch.double)
    for t in range(length):
        expected[:, t, t : t + 6] = scores[:, t]
    check_value_and_gradient(skew(scores, 0.5), expected, [scores])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("form", [attend, with_memory])
def test_many_scores_are_computed_in_pieces(monkeypatch, shared, heads, form):
    inputs = tensors(memory=4)
    bias = causal_bias(*inputs[:2])
    if not shared:
        own = torch.randn(3, 5, 5, dtype=torch.double, requires_grad=True)
        bias = bias + torch.nn.functional.pad(own, (4, 0))
        inputs.append(own)
    expected = attend_reference(*inputs[:3], bias)
    monkeypatch.setattr(ATTENTION, "MAX_SCORES_ON_CPU", heads * 5 * 9)
    check_value_and_gradient(form(*inputs[:3], bias), expected, inputs)


def test_memory_is_seen_by_the_fused_form_too():
    queries, keys, values = (x.detach() for x in tensors(memory=4))
    bias = causal_bias(queries, keys)
    with torch.no_grad():
        found = with_memory(queries, keys, values, bias)
        torch.testing.assert_close(found, attend_reference(queries, keys, values, bias))


def test_pieces_have_the_same_dropout_in_both_passes(monkeypatch):
    queries, keys, values = tensors(memory=4)
    monkeypatch.setattr(ATTENTION, "MAX_SCORES_ON_CPU", 2 * 5 * 9)
    mixed = attend(queries, keys, values, causal_bias(queries, keys), p=0.5)
    weight = torch.randn_like(mixed)
    (actual,) = torch.autograd.grad((mixed * weight).sum(), values)
    # The mix is linear in the values, so that its gradient says what was computed.
    torch.testing.assert_close((actual * values).sum(), (mixed * weight).sum())


def test_training_with_a_long_window_holds_no_scores():
    """One head of eight streams, 256 queries, 70,000 keys: the scores would be 573 MB."""
    queries = torch.randn(256, 8, 2, requires_grad=True)
    keys, values = torch.randn(2, 70000, 8, 2).unbind()
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixed = attend(queries, keys, values, causal_bias(queries, keys), p=0.1)
    assert sum(held.values()) < 8 * 256 * 70000 * 4 / 4  # most of it the bias
    mixed.sum().backward()
    assert queries.grad.isfinite().all()
