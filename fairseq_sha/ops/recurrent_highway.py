"""The recurrence of a recurrent highway network (J. Zilly et al., arXiv 1607.03474, equations 6 to
9), with the carry gate ``1 - t``."""

import torch
from torch.autograd.function import once_differentiable

from fairseq_sha.ops.products import (
    add_product,
    loop_types,
    product,
    transposed,
    without_autocast,
)


def recurrent_highway(from_x, s0, weights, biases, mask=None):
    """Run the recurrence over a segment. Each step has ``D`` micro-steps, from d = 0 on::

        a, b = R_d (s * mask) + b_d    and, where d = 0, + from_x_t
        t = sigmoid(b)
        s <- s + (tanh(a) - s) * t

    The state is kept in float32 or wider, whatever the type of the inputs.

    Args:
        from_x (Tensor): what the input adds in the first micro-step, ``[T, B, 2 H]``
        s0 (Tensor): the state before the first step, ``[B, H]``
        weights (Tensor): ``R [D, 2 H, H]``, rows of a, then of b
        biases (Tensor): ``[D, 2 H]``
        mask (Tensor): a dropout mask for the whole segment, ``[B, H]``, without gradient, or None

    Returns:
        s after each step ``[T, B, H]``, of the type of ``from_x``, and the last s ``[B, H]``, of
        the type of the state
    """
    wide, narrow = loop_types(from_x)
    with without_autocast(from_x):
        mask = mask if mask is None else mask.to(wide)
        inputs = from_x.to(wide), s0.to(wide), weights.to(narrow), biases.to(wide)
        if torch.is_grad_enabled():
            states, last = _RecurrentHighway.apply(mask, *inputs)
        else:
            states = _forward(mask, *inputs)[1][-1]
            last = states[-1].clone()
    return states.to(from_x.dtype), last


def _forward(mask, from_x, s0, weights, biases):
    """tanh(a) and t of each micro-step ``[D, T, B, 2 H]`` and the states after it
    ``[D, T, B, H]``."""
    width = s0.size(1)
    gates = biases[:, None, None].repeat(1, *from_x.shape[:2], 1)
    gates[0] += from_x
    states = from_x.new_empty(*gates.shape[:3], width)
    columns = [transposed(weight, len(from_x)) for weight in weights]
    steps = zip(zip(*(g.unbind() for g in gates)), zip(*(s.unbind() for s in states)))
    s = s0
    for gates_t, states_t in steps:
        for weight, both, out in zip(columns, gates_t, states_t):
            add_product(both, s if mask is None else s * mask, weight)
            h, t = both[:, :width].tanh_(), both[:, width:].sigmoid_()
            s = torch.lerp(s, h, t, out=out)
    return gates, states


class _RecurrentHighway(torch.autograd.Function):
    """Derivatives within micro-steps are computed for all of them at once. The loop back has one
    product for each micro-step, as the loop forward. The gradients of the weights are one product
    over all steps for each depth."""

    @staticmethod
    def forward(ctx, mask, from_x, s0, weights, biases):
        gates, states = _forward(mask, from_x, s0, weights, biases)
        ctx.save_for_backward(mask, s0, weights, gates, states)
        return states[-1].clone(), states[-1, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_s):
        mask, s0, weights, gates, states = ctx.saved_tensors
        h, t = gates.chunk(2, 3)
        before = torch.empty_like(states)
        before[1:] = states[:-1]
        before[0, 1:] = states[-1, :-1]
        before[0, 0] = s0
        keep = 1 - t
        grads = torch.empty_like(gates)  # first of s with respect to a and b, [D, T, B, 2 H]
        grad_a, grad_b = grads.chunk(2, 3)
        torch.mul(t, 1 - h * h, out=grad_a)
        torch.mul(h - before, t * keep, out=grad_b)
        depth, length, streams, width = states.shape
        pairs = grads.view(depth, length, streams, 2, width)
        for time in reversed(range(length)):
            grad_s = grad_s + grad_states[time]
            for d in reversed(range(depth)):
                pairs[d, time].mul_(grad_s.unsqueeze(1))
                through = product(grads[d, time], weights[d])
                if mask is not None:
                    through *= mask
                grad_s = through.addcmul_(grad_s, keep[d, time])
        if mask is not None:
            before *= mask
        flat = grads.flatten(1, 2).to(weights.dtype)
        grad_weights = flat.transpose(1, 2) @ before.flatten(1, 2).to(weights.dtype)
        return None, grads[0], grad_s, grad_weights, grads.sum((1, 2))
