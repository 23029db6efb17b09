"""The recurrences of the Mogrifier LSTM and of recurrent highway networks against their
definitions, in value and gradient."""

import pytest
import torch

from fairseq_sha.ops import Gates, mogrifier_lstm, recurrent_highway
from fairseq_sha.ops.oracles import (
    lstm_reference,
    mogrifier_lstm_reference,
    recurrent_highway_reference,
)


def random(*shape, scale=0.7):
    return (scale * torch.randn(*shape, dtype=torch.double)).requires_grad_()


def lstm_inputs(rank, num_rounds, rows=4, length=5, streams=3, width=4, hidden=6):
    """Arguments of the Mogrifier LSTM; ``rank`` 0 is a full matrix."""
    inputs = [random(length, streams, width), random(streams, hidden), random(streams, hidden)]
    inputs += [random(rows * hidden, width), random(rows * hidden, hidden), random(rows * hidden)]
    rounds = []
    for r in range(num_rounds):
        source, target = (width, hidden) if r % 2 else (hidden, width)
        a = random(rank, source) if rank else None
        rounds.append((a, random(target, rank or source), random(target)))
    return inputs, rounds


def check(form, reference, tensors):
    """Equal outputs and gradients, the final state's included."""
    actual, expected = form(), reference()
    torch.testing.assert_close(actual, expected)
    weights = [torch.randn_like(tensor) for tensor in expected]

    def gradients(outputs):
        total = sum((tensor * weight).sum() for tensor, weight in zip(outputs, weights))
        return torch.autograd.grad(total, tensors)

    torch.testing.assert_close(gradients(actual), gradients(expected))
    with torch.no_grad():
        torch.testing.assert_close(form(), expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("input_gate", ["capped", "coupled", "free"])
@pytest.mark.parametrize("rank, num_rounds", [(0, 0), (0, 1), (0, 3), (2, 5), (3, 6)])
def test_mogrifier_lstm_equals_its_definition(rank, num_rounds, input_gate, masked):
    gates = Gates(input_gate)
    inputs, rounds = lstm_inputs(rank, num_rounds, gates.rows)
    mask = (torch.rand(3, 6) < 0.6).double() / 0.6 if masked else None
    check(
        lambda: mogrifier_lstm(*inputs, rounds, mask, gates),
        lambda: mogrifier_lstm_reference(*inputs, rounds, mask, gates),
        [*inputs, *(t for maps in rounds for t in maps if t is not None)],
    )


def test_cell_clip_bounds_what_the_next_step_reads():
    inputs, rounds = lstm_inputs(2, 2, length=7)
    gates = Gates("free", 0.5)
    check(
        lambda: mogrifier_lstm(*inputs, rounds, None, gates),
        lambda: mogrifier_lstm_reference(*inputs, rounds, None, gates),
        [*inputs, *(t for maps in rounds for t in maps)],
    )
    _, _, c = mogrifier_lstm(*inputs, rounds, None, gates)
    assert c.abs().max() == 0.5
    assert mogrifier_lstm(*inputs, rounds, None, Gates("free"))[2].abs().max() > 0.5


def test_without_cap_and_rounds_it_is_the_lstm():
    (x, h0, c0, weight_x, weight_h, bias), _ = lstm_inputs(0, 0)

    def reordered(weight):
        j, f, i, o = weight.chunk(4)
        return torch.cat([i, f, j, o])

    expected = lstm_reference(
        x, h0[None], c0[None], *map(reordered, (weight_x, weight_h, bias)), torch.zeros_like(bias)
    )
    out, h, c = mogrifier_lstm(x, h0, c0, weight_x, weight_h, bias, gates=Gates("free"))
    torch.testing.assert_close((out, h[None], c[None]), expected)


def test_rounds_of_zeros_change_nothing():
    inputs, rounds = lstm_inputs(2, 4)
    zeros = [[torch.zeros_like(tensor) for tensor in maps] for maps in rounds]
    torch.testing.assert_close(mogrifier_lstm(*inputs, zeros), mogrifier_lstm(*inputs))


def highway_inputs(depth, length=5, streams=3, width=4):
    weights = random(depth, 2 * width, width), random(depth, 2 * width)
    return [random(length, streams, 2 * width), random(streams, width), *weights]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depth, length", [(1, 1), (1, 5), (3, 5), (4, 1)])
def test_recurrent_highway_equals_its_definition(depth, length, masked):
    inputs = highway_inputs(depth, length)
    mask = (torch.rand(3, 4) < 0.6).double() / 0.6 if masked else None
    check(
        lambda: recurrent_highway(*inputs, mask),
        lambda: recurrent_highway_reference(*inputs, mask),
        inputs,
    )


def test_shut_transform_gates_keep_the_state():
    from_x, s0, weights, biases = highway_inputs(3)
    with torch.no_grad():
        biases[:, 4:] = -1e6
    out, last = recurrent_highway(from_x, s0, weights, biases)
    assert torch.equal(out, s0.expand_as(out)) and torch.equal(last, s0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(half):
    inputs, rounds = lstm_inputs(2, 3, length=40)
    narrow = [tensor.detach().to(half) for tensor in inputs]
    maps = [[tensor.detach().to(half) for tensor in maps] for maps in rounds]
    out, h, c = mogrifier_lstm(*narrow, maps)
    assert out.dtype == half and h.dtype == c.dtype == torch.float32
    wide = [tensor.float() for tensor in narrow]
    wide_maps = [[tensor.float() for tensor in round_maps] for round_maps in maps]
    torch.testing.assert_close(c, mogrifier_lstm_reference(*wide, wide_maps)[2], atol=1e-5, rtol=0)
    narrow = [tensor.detach().to(half) for tensor in highway_inputs(3, 40)]
    out, s = recurrent_highway(*narrow)
    assert out.dtype == half and s.dtype == torch.float32
    expected = recurrent_highway_reference(*(tensor.float() for tensor in narrow))[1]
    torch.testing.assert_close(s, expected, atol=1e-5, rtol=0)


def test_autocast_leaves_the_loops_in_float32_on_a_cpu():
    inputs, rounds = lstm_inputs(2, 2)
    inputs = [tensor.detach().float() for tensor in inputs]
    rounds = [[tensor.detach().float() for tensor in maps] for maps in rounds]
    expected = mogrifier_lstm(*inputs, rounds)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, mogrifier_lstm(*inputs, rounds), expected))
