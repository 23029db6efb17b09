"""Recurrences as Triton kernels. Each program runs one block of columns through all time steps."""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _scan(a, b, h0, states, steps, columns, first, stride, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    h = tl.load(h0 + column, mask=inside)
    at = first + column
    for _ in range(steps):
        h = tl.load(a + at, mask=inside) * h + tl.load(b + at, mask=inside)
        tl.store(states + at, h, mask=inside)
        at += stride


def triton_scan(a, b, h0, reverse=False, out=None):
    """:func:`fairseq_sha.ops.linear_recurrence.scan`, in one kernel."""
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    states = torch.empty_like(b) if out is None else out
    steps, columns = len(a), h0.numel()
    first, stride = (_last_row(steps, columns), -columns) if reverse else (0, columns)
    grid = (triton.cdiv(columns, BLOCK),)
    with torch.cuda.device_of(a):
        _scan[grid](a, b, h0, states, steps, columns, first, stride, BLOCK=BLOCK)
    return states


def _last_row(steps, columns):
    """Where the row of the last step begins. Kernels get it as an argument, because their 32-bit
    arithmetic could overflow."""
    return (steps - 1) * columns


@triton.jit
def _load_pair(rows, unit, width, inside):
    return tl.load(rows + unit, mask=inside), tl.load(rows + width + unit, mask=inside)


@triton.jit
def _sru_forward(
    u, x, weight, bias, c0, mask, o, states, steps, columns, width, BLOCK: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    unit = column % width
    v_f, v_r = _load_pair(weight, unit, width, inside)
    b_f, b_r = _load_pair(bias, unit, width, inside)
    kept = tl.load(mask + column, mask=inside)
    c = tl.load(c0 + column, mask=inside)
    tl.store(states + column, c, mask=inside)
    at = column
    for _ in range(steps):
        u_at = u + 3 * at - 2 * unit  # rows of u are three times as long, and begin with u0
        u0 = tl.load(u_at, mask=inside).to(c.dtype)
        u1 = tl.load(u_at + width, mask=inside).to(c.dtype)
        u2 = tl.load(u_at + 2 * width, mask=inside).to(c.dtype)
        x_t = tl.load(x + at, mask=inside).to(c.dtype)
        f = 1 / (1 + tl.exp(-(u1 + v_f * c + b_f)))
        r = 1 / (1 + tl.exp(-(u2 + v_r * c + b_r)))
        c = u0 + (c - u0) * f
        tl.store(o + at, x_t + (c - x_t) * kept * r, mask=inside)
        at += columns
        tl.store(states + at, c, mask=inside)


def sru_forward(u, x, weight, bias, c0, mask):
    """The outputs of :func:`fairseq_sha.ops.sru`, of the type of ``x``, and all states, beginning
    with ``c0``: ``[T + 1, B, D]``."""
    o, states = torch.empty_like(x), c0.new_empty(len(x) + 1, *c0.shape)
    sizes = len(u), c0.numel(), c0.size(-1)
    grid = (triton.cdiv(c0.numel(), BLOCK),)
    with torch.cuda.device_of(u):
        _sru_forward[grid](u, x, weight, bias, c0, mask, o, states, *sizes, BLOCK=BLOCK)
    return o, states


@triton.jit
def _sru_backward(
    u, x, weight, bias, mask, states, grad_o, grad_last,
    grad_u, grad_x, grad_c0, grad_parameters, steps, columns, width, last, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    unit = column % width
    v_f, v_r = _load_pair(weight, unit, width, inside)
    b_f, b_r = _load_pair(bias, unit, width, inside)
    kept = tl.load(mask + column, mask=inside)
    grad_c = tl.load(grad_last + column, mask=inside)  # from the steps that follow
    at = last + column
    c = tl.load(states + at + columns, mask=inside)
    grad_v_f = tl.zeros_like(c)
    grad_v_r = tl.zeros_like(c)
    grad_b_f = tl.zeros_like(c)
    grad_b_r = tl.zeros_like(c)
    for _ in range(steps):
        before = tl.load(states + at, mask=inside)
        from_u = 3 * at - 2 * unit
        u0 = tl.load(u + from_u, mask=inside).to(c.dtype)
        u1 = tl.load(u + from_u + width, mask=inside).to(c.dtype)
        u2 = tl.load(u + from_u + 2 * width, mask=inside).to(c.dtype)
        x_t = tl.load(x + at, mask=inside).to(c.dtype)
        grad_o_t = tl.load(grad_o + at, mask=inside).to(c.dtype)
        f = 1 / (1 + tl.exp(-(u1 + v_f * before + b_f)))
        r = 1 / (1 + tl.exp(-(u2 + v_r * before + b_r)))
        through_c = grad_o_t * kept * r
        grad_c += through_c
        grad_f = grad_c * (before - u0) * f * (1 - f)
        grad_r = grad_o_t * kept * (c - x_t) * r * (1 - r)
        tl.store(grad_x + at, grad_o_t - through_c, mask=inside)
        tl.store(grad_u + from_u, grad_c * (1 - f), mask=inside)
        tl.store(grad_u + from_u + width, grad_f, mask=inside)
        tl.store(grad_u + from_u + 2 * width, grad_r, mask=inside)
        grad_v_f += grad_f * before
        grad_v_r += grad_r * before
        grad_b_f += grad_f
        grad_b_r += grad_r
        grad_c = grad_c * f + grad_f * v_f + grad_r * v_r
        c = before
        at -= columns
    tl.store(grad_c0 + column, grad_c, mask=inside)
    tl.store(grad_parameters + column, grad_v_f, mask=inside)
    tl.store(grad_parameters + columns + column, grad_v_r, mask=inside)
    tl.store(grad_parameters + 2 * columns + column, grad_b_f, mask=inside)
    tl.store(grad_parameters + 3 * columns + column, grad_b_r, mask=inside)


def sru_backward(u, x, weight, bias, mask, states, grad_o, grad_last):
    """The gradients of u, x, weight, bias and c0, given those of the outputs and the last state."""
    grad_o, grad_last = grad_o.contiguous(), grad_last.contiguous()
    grad_u, grad_x, grad_c0 = torch.empty_like(u), torch.empty_like(x), torch.empty_like(grad_last)
    grad_parameters = grad_c0.new_empty(4, *grad_c0.shape)  # for each stream
    steps, columns, width = len(u), grad_c0.numel(), grad_c0.size(-1)
    sizes = steps, columns, width, _last_row(steps, columns)
    grid = (triton.cdiv(grad_c0.numel(), BLOCK),)
    with torch.cuda.device_of(u):
        _sru_backward[grid](
            u, x, weight, bias, mask, states, grad_o, grad_last,
            grad_u, grad_x, grad_c0, grad_parameters, *sizes, BLOCK=BLOCK,
        )  # fmt: skip
    grad_weight, grad_bias = grad_parameters.sum(1).split(2)
    return grad_u, grad_x, grad_weight, grad_bias, grad_c0


class TritonSRURecurrence(torch.autograd.Function):
    """:func:`fairseq_sha.ops.sru`, in one forward and one backward kernel. ``u`` and ``x`` may be
    in half precision; the others have the type of the state. The backward kernel recomputes the
    gates."""

    @staticmethod
    def forward(ctx, u, x, weight, bias, c0, mask):
        u, x, weight, bias, c0, mask = map(torch.Tensor.contiguous, (u, x, weight, bias, c0, mask))
        o, states = sru_forward(u, x, weight, bias, c0, mask)
        ctx.save_for_backward(u, x, weight, bias, mask, states)
        return o, states[-1].clone()

    @staticmethod
    def backward(ctx, grad_o, grad_last):
        return (*sru_backward(*ctx.saved_tensors, grad_o, grad_last), None)
