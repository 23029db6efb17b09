"""The LSTM against its definition, and on processors without kernels for half precision."""

import os
import subprocess
import sys

import pytest
import torch

from fairseq_sha.modules import LSTM
from fairseq_sha.ops import lstm
from fairseq_sha.ops.oracles import lstm_reference
from tests.ops.test_recurrences import check


def lstm_inputs(length=7, dtype=torch.double, streams=2, width=3, hidden=5):
    state, rows = (1, streams, hidden), 4 * hidden
    shapes = [(length, streams, width), state, state, (rows, width), (rows, hidden), rows, rows]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_equals_its_definition(length, dtype):
    check(lstm, lstm_reference, lstm_inputs(length, dtype), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2])
def test_equals_its_definition_without_gradient(length):
    inputs = lstm_inputs(length)
    torch.testing.assert_close(lstm(*inputs), lstm_reference(*inputs))


# oneDNN reads its environment variables once, hence a process of its own. They make this processor
# one without AVX-512, which has no bfloat16 kernel for LSTMs.
WITHOUT_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
HALF_PRECISION = """
import contextlib
import torch
from fairseq_sha.modules import LSTM

torch.manual_seed(1)
x, weight = torch.randn(6, 3, 16), torch.randn(6, 3, 16)
exact, half = LSTM(16), LSTM(16)
half.load_state_dict(exact.state_dict())


def run(cell, x, precision):
    state = {}
    with precision:
        pieces = []
        for piece in x.split([1, 4, 1]):
            out, state = cell(piece, state)
            pieces.append(out)
    out = torch.cat(pieces)
    (out.float() * weight).sum().backward()
    return [out, *state.values(), *(parameter.grad for parameter in cell.parameters())]


expected = run(exact, x, contextlib.nullcontext())
if "MODE" == "weights":
    half.bfloat16()
    found = run(half, x.bfloat16(), contextlib.nullcontext())
else:
    found = run(half, x, torch.autocast("cpu", torch.bfloat16))
assert all(tensor.dtype == torch.bfloat16 for tensor in found[:3])
for actual, exact in zip(found, expected):
    error = (actual.float() - exact).abs().max() / exact.abs().max()
    assert error < 2e-2, float(error)
with torch.no_grad():
    half.bfloat16()(x[:2].bfloat16(), {})  # logs no second message
print("precisions agree")
"""


@pytest.mark.parametrize("environment", [{}, WITHOUT_AVX512])
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_runs_on_every_processor(mode, environment):
    done = subprocess.run(
        [sys.executable, "-c", HALF_PRECISION.replace("MODE", mode)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout.endswith("precisions agree\n"), done.stdout
    messages = done.stdout.count("LSTMs are computed in float32")
    if environment and mode == "autocast":
        assert messages == 1
    else:  # some versions of torch do without oneDNN where weights are in bfloat16
        assert messages <= 1


def test_state_of_another_precision():
    """As a run with automatic mixed precision leaves it to one without."""
    torch.manual_seed(1)
    layer, x = LSTM(6), torch.randn(3, 2, 6)
    half = {key: torch.randn(1, 2, 6).to(torch.bfloat16) for key in "hc"}
    out, state = layer(x, half)
    expected, _ = layer(x, {key: value.float() for key, value in half.items()})
    assert out.dtype == state["c"].dtype == torch.float32 and torch.equal(out, expected)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = layer(x, half)
    torch.testing.assert_close(mixed.float(), expected, atol=0.05, rtol=0.05)
