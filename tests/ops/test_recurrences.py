"""The recurrences against their definitions, in value and gradient."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fairseq_sha.ops import linear_recurrence, sru
from fairseq_sha.ops.oracles import (
    linear_recurrence_reference,
    sru_reference,
)


def linear_inputs(length=7, dtype=torch.double):
    shape = (length, 2, 5)
    a, b = torch.rand(shape, dtype=dtype) * 2 - 0.5, torch.randn(shape, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (a, b, torch.randn(2, 5, dtype=dtype))]


def sru_inputs(length=7, dtype=torch.double, streams=2, width=5):
    state, per_unit = (streams, width), (2, width)
    shapes = [(length, streams, 3, width), (length, *state), per_unit, per_unit, state]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def sru_mask(dtype=torch.double):
    return torch.tensor([[0, 1.5, 1.5, 0, 1.5], [1.5, 1.5, 0, 0, 1.5]], dtype=dtype)


def check(form, reference, inputs, *others, **tolerance):
    actual, expected = form(*inputs, *others), reference(*inputs, *others)
    for a, b in zip(actual, expected):
        assert a.dtype == b.dtype
    torch.testing.assert_close(actual, expected, **tolerance)
    weights = [torch.randn_like(tensor) for tensor in expected]

    def gradients(outputs):
        total = sum((tensor * weight).sum() for tensor, weight in zip(outputs, weights))
        return torch.autograd.grad(total, inputs)

    torch.testing.assert_close(gradients(actual), gradients(expected), **tolerance)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_linear_recurrence_equals_its_definition(length):
    check(linear_recurrence, linear_recurrence_reference, linear_inputs(length))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_sru_equals_its_definition(length, masked):
    mask = sru_mask() if masked else None
    check(sru, sru_reference, sru_inputs(length), mask)


def test_sru_of_a_size_whose_gradient_is_taken_in_pieces():
    assert 64 * 1024 * 5 > sys.modules[sru.__module__].ELEMENTS_IN_CACHE
    inputs = sru_inputs(5, streams=64, width=1024)
    mask = torch.randint(2, (64, 1024)).double()
    check(sru, sru_reference, inputs, mask)


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(linear_recurrence, linear_inputs(4))
    assert torch.autograd.gradcheck(lambda *inputs: sru(*inputs, sru_mask()), sru_inputs(4))


def test_long_sequences_keep_their_precision():
    """float32 over 4,096 steps beside float64; a scan in log space would be off by 3e-3."""
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(4096, 2, 5, generator=generator).pow(0.01)  # a long memory
    b, h0 = torch.randn(4096, 2, 5, generator=generator) * (1 - a), torch.zeros(2, 5)
    states, last = linear_recurrence(a, b, h0)
    exact, _ = linear_recurrence_reference(a.double(), b.double(), h0.double())
    torch.testing.assert_close(states.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(last, states[-1])

    inputs = [tensor.detach() for tensor in sru_inputs(4096, torch.float)]
    o, c = sru(*inputs)
    exact, exact_c = sru_reference(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(o.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c.double(), exact_c, atol=1e-4, rtol=1e-4)


def test_extreme_gates():
    u, x, weight, bias, c0 = sru_inputs(6, torch.float)
    with torch.no_grad():
        u[:, :, 1:] *= 200  # open or shut altogether
    check(sru, sru_reference, [u, x, weight, bias, c0])
    a, b, h0 = linear_inputs(6, torch.float)
    with torch.no_grad():
        a.copy_((a > 0.5).float())
    check(linear_recurrence, linear_recurrence_reference, [a, b, h0])


def test_bfloat16_inputs_have_a_float32_state():
    def halve(inputs):
        return [t.detach().bfloat16().requires_grad_() for t in inputs]

    inputs = halve(sru_inputs(64, torch.float))
    o, c = sru(*inputs)
    assert o.dtype == torch.bfloat16 and c.dtype == torch.float32
    check(sru, sru_reference, inputs, atol=1e-2, rtol=2e-2)
    inputs = halve(linear_inputs(64, torch.float))
    states, last = linear_recurrence(*inputs)
    assert states.dtype == torch.bfloat16 and last.dtype == torch.float32
    exact, _ = linear_recurrence_reference(*(tensor.detach().double() for tensor in inputs))
    torch.testing.assert_close(last.double(), exact[-1], atol=1e-4, rtol=1e-4)


KERNELS = """
import sys
import torch
from fairseq_sha.ops.linear_recurrence import cpu_scan
from fairseq_sha.ops.oracles import sru_reference
from fairseq_sha.ops.triton_kernels import TritonSRURecurrence, triton_scan

torch.manual_seed(1)
for dtype in (torch.float, torch.double):
    for steps, streams, width in ((1, 1, 1), (5, 3, 50), (9, 2, 64), (3, 4, 100)):
        a, b = torch.randn(2, steps, streams, width, dtype=dtype).unbind()
        h0 = torch.randn(streams, width, dtype=dtype)
        for reverse in (False, True):
            # Views, as the gradient passes them.
            inputs = a[1:], b[:-1], h0, reverse
            if steps > 1:
                expected, out = cpu_scan(*inputs), torch.full_like(a, 7)
                torch.testing.assert_close(triton_scan(*inputs), expected)
                assert triton_scan(*inputs, out=out[:-1]).data_ptr() == out.data_ptr()
                torch.testing.assert_close(out, torch.cat([expected, torch.full_like(a[:1], 7)]))
        torch.testing.assert_close(triton_scan(a, b, h0), cpu_scan(a, b, h0))
        shapes = (steps, streams, 3, width), (steps, streams, width), (2, width), (2, width)
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        inputs.append(h0.requires_grad_())
        mask = 1.5 * torch.randint(2, h0.shape).to(dtype)
        found, expected = TritonSRURecurrence.apply(*inputs, mask), sru_reference(*inputs, mask)
        torch.testing.assert_close(found, expected)
        weights = [torch.randn_like(tensor) for tensor in expected]
        found, expected = (
            torch.autograd.grad(sum((x * y).sum() for x, y in zip(out, weights)), inputs)
            for out in (found, expected)
        )
        torch.testing.assert_close(found, expected)
# Inputs in half precision, state in float32.
shapes = (5, 2, 3, 50), (5, 2, 50), (2, 50), (2, 50), (2, 50)
inputs = [torch.randn(shape) for shape in shapes]
half = [tensor.half().requires_grad_() for tensor in inputs[:2]]
wide = [tensor.detach().float().requires_grad_() for tensor in half]
rest, mask = inputs[2:], torch.ones(2, 50)
o, c = TritonSRURecurrence.apply(*half, *rest, mask)
expected = sru_reference(*wide, *rest, mask)
assert o.dtype == torch.half and c.dtype == torch.float
torch.testing.assert_close(o.float(), expected[0], atol=5e-3, rtol=5e-3)
torch.testing.assert_close(c, expected[1])
for found, exact in zip(
    torch.autograd.grad(o.float().sum(), half), torch.autograd.grad(expected[0].sum(), wide)
):
    torch.testing.assert_close(found.float(), exact, atol=5e-3, rtol=5e-3)
print("kernels agree")
"""


COMPILATION = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq_sha.ops import triton_kernels
HALVES = "u", "x", "o", "grad_o", "grad_u", "grad_x"
NUMBERS = "steps", "columns", "width", "first", "stride", "last"
for name in ("_scan", "_sru_forward", "_sru_backward"):
    kernel = getattr(triton_kernels, name)
    ones = {number: 1 for number in NUMBERS if number in kernel.arg_names}
    for state, half, constants in (
        ("*fp32", "*fp16", {}),
        ("*fp32", "*bf16", {}),
        ("*fp64", "*fp64", {}),
        ("*fp32", "*fp32", ones),  # which Triton takes for constants
    ):
        constants, signature = {"BLOCK": 128, **constants}, {}
        for argument in kernel.arg_names:
            is_number = argument in NUMBERS
            signature[argument] = "i32" if is_number else half if argument in HALVES else state
        if "constexprs" in inspect.signature(ASTSource).parameters:
            signature.update(dict.fromkeys(constants, "constexpr"))
            source = ASTSource(kernel, signature, constexprs=constants)
        else:  # before Triton 3.2, which torch has since version 2.6
            signature = {k: v for k, v in signature.items() if k not in constants}
            source = ASTSource(kernel, signature, constants=constants)
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
print("kernels compile")
"""


def test_triton_kernels_in_the_interpreter():
    check_with_triton(KERNELS, "kernels agree\n", TRITON_INTERPRET="1")


def test_triton_kernels_compile_for_a_gpu():
    """The interpreter does not show this. It needs no GPU."""
    check_with_triton(COMPILATION, "kernels compile\n")


def check_with_triton(code, expected, **environment):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which torch brings along on Linux")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout.endswith(expected), done.stdout
