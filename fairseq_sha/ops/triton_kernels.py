"""Recurrences as Triton kernels: a program for each block of columns, sequential in time.

Correctness is tested with Triton's interpreter; nothing here has run on a GPU.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _scan(a, b, h0, states, steps, columns, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    h = tl.load(h0 + column, mask=inside)
    for step in range(steps):
        t = step
        if REVERSE:
            t = steps - 1 - step
        at = t * columns.to(tl.int64) + column
        h = tl.load(a + at, mask=inside) * h + tl.load(b + at, mask=inside)
        tl.store(states + at, h, mask=inside)


def scan(a, b, h0, reverse=False, out=None):
    """:func:`fairseq_sha.ops.linear_recurrence.scan` in one kernel."""
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    states = torch.empty_like(b) if out is None else out
    columns = h0.numel()
    grid = (triton.cdiv(columns, BLOCK),)
    with torch.cuda.device_of(a):
        _scan[grid](a, b, h0, states, len(a), columns, REVERSE=reverse, BLOCK=BLOCK)
    return states


@triton.jit
def _recur(u, weight, bias, c0, gates, states, steps, columns, width, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    stream, unit = column // width, column % width
    v_f = tl.load(weight + unit, mask=inside)
    v_r = tl.load(weight + width + unit, mask=inside)
    b_f = tl.load(bias + unit, mask=inside)
    b_r = tl.load(bias + width + unit, mask=inside)
    c = tl.load(c0 + column, mask=inside)
    for t in range(steps):
        at = t * columns.to(tl.int64)
        u_at = u + 3 * (at + stream * width) + unit
        u0 = tl.load(u_at, mask=inside)
        f = 1 / (1 + tl.exp(-(tl.load(u_at + width, mask=inside) + v_f * c + b_f)))
        r = 1 / (1 + tl.exp(-(tl.load(u_at + 2 * width, mask=inside) + v_r * c + b_r)))
        c = u0 + (c - u0) * f
        gates_at = gates + 2 * (at + stream * width) + unit
        tl.store(gates_at, f, mask=inside)
        tl.store(gates_at + width, r, mask=inside)
        tl.store(states + at + column, c, mask=inside)


def recur(u, weight, bias, c0):
    """:func:`fairseq_sha.ops.sru.recur` in one kernel."""
    u, weight, bias, c0 = (tensor.contiguous() for tensor in (u, weight, bias, c0))
    steps, streams, _, width = u.shape
    gates = u.new_empty(steps, streams, 2, width)
    states = u.new_empty(steps, streams, width)
    columns = streams * width
    grid = (triton.cdiv(columns, BLOCK),)
    with torch.cuda.device_of(u):
        _recur[grid](u, weight, bias, c0, gates, states, steps, columns, width, BLOCK=BLOCK)
    return gates, states
