"""The Mogrifier LSTM (G. Melis et al., arXiv 1909.01792, section 2), and without rounds the LSTM of
the same paper."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fairseq_sha.ops.products import (
    add_product,
    loop_types,
    product,
    transposed,
    weight_gradient,
    without_autocast,
)


class Gates(NamedTuple):
    """How the cell state is updated.

    Args:
        input_gate: ``capped`` at ``1 - f``, ``coupled`` to be ``1 - f``, or ``free``
        cell_clip: bound on the absolute values of the carried cell state; 0 for none
    """

    input_gate: str = "capped"
    cell_clip: float = 0.0

    @property
    def rows(self):
        """How many of j, f, i and o the matrices have rows for."""
        return 3 if self.input_gate == "coupled" else 4


#: The gates of the published models.
CAPPED = Gates()


def mogrifier_lstm(x, h0, c0, weight_x, weight_h, bias, rounds=(), mask=None, gates=CAPPED):
    """Run the recurrence over a segment. At each step input and state first scale each other::

        y = h_(t-1) * mask
        x <- x * 2 sigmoid(B_r A_r y + b_r)    in rounds 0, 2, ...
        y <- y * 2 sigmoid(B_r A_r x + b_r)    in rounds 1, 3, ...
        j, f, i, o = W_x x + W_h y + b         then tanh of j and sigmoid of the others
        c_t = f * c_(t-1) + min(1 - f, i) * j
        h_t = o * tanh(c_t)

    With a cell clip, the state that the next step reads is ``c_t`` within the bounds; ``h_t`` is of
    ``c_t`` itself, as in the published code.

    State and gates are kept in float32 or wider, whatever the type of the inputs.

    Args:
        x (Tensor): ``[T, B, E]``
        h0, c0 (Tensor): the state before the first step, ``[B, H]``
        weight_x, weight_h, bias (Tensor): ``[4 H, E]``, ``[4 H, H]`` and ``[4 H]``; the rows of j,
            f, i and o follow one another. With coupled gates there are none of i
        rounds (list): for each round ``A [K, in]``, ``B [out, K]`` and ``b [out]``. ``A`` may be
            None for a full matrix ``B [out, in]``
        mask (Tensor): a dropout mask for the whole segment, ``[B, H]``, without gradient, or None
        gates (Gates): how the cell state is updated

    Returns:
        all h ``[T, B, H]``, of the type of ``x``, and the last h and c ``[B, H]``, of the type of
        the state
    """
    wide, narrow = loop_types(x)
    with without_autocast(x):
        mask = mask if mask is None else mask.to(wide)
        maps = []
        for a, b, offset in rounds:
            maps += [a if a is None else a.to(narrow), b.to(narrow), offset.to(wide)]
        weights = weight_x.to(narrow), weight_h.to(narrow), bias.to(wide), *maps
        inputs = x.to(wide), h0.to(wide), c0.to(wide)
        if torch.is_grad_enabled():
            states, h, c = _MogrifierLSTM.apply(gates, mask, *inputs, *weights)
        else:
            states, cells, *_ = _forward(gates, mask, *inputs, *weights)
            h, c = states[-1].clone(), cells[-1].clone()
    return states.to(x.dtype), h, c


def _in_threes(maps):
    return [maps[i : i + 3] for i in range(0, len(maps), 3)]


def _forward(gates, mask, x, h0, c0, weight_x, weight_h, bias, *maps):
    """All h, all carried c ``[T, B, H]``, all gates ``[T, B, 4 H]`` and the factors of each round
    ``[T, B, out]``."""
    rounds, width = _in_threes(maps), h0.size(1)
    shape = x.shape[:2]
    states, cells = (x.new_empty(*shape, width) for _ in range(2))
    if rounds:
        from_x = transposed(weight_x, len(x))
        all_gates = bias.repeat(*shape, 1)
    else:
        # Without rounds, no input depends on the state: one product for all steps.
        all_gates = product(x, weight_x.t()) + bias
    from_h = transposed(weight_h, len(x))
    downs = [a if a is None else transposed(a, len(x)) for a, _, _ in rounds]
    ups = [transposed(b, len(x)) for _, b, _ in rounds]
    factors = [offset.repeat(*shape, 1) for _, _, offset in rounds]
    h, c = h0, c0
    steps = zip(x.unbind(), all_gates.unbind(), states.unbind(), cells.unbind())
    for t, (x_t, gates_t, h_t, c_t) in enumerate(steps):
        y = h if mask is None else h * mask
        for r, (down, up) in enumerate(zip(downs, ups)):
            source = x_t if r % 2 else y
            factor = factors[r][t]
            add_product(factor, source if down is None else product(source, down), up)
            factor.sigmoid_().mul_(2)
            if r % 2:
                y = y * factor
            else:
                x_t = x_t * factor
        if rounds:
            add_product(gates_t, x_t, from_x)
        add_product(gates_t, y, from_h)
        gates_t[:, :width].tanh_()
        gates_t[:, width:].sigmoid_()
        j, f, *i, o = gates_t.chunk(gates.rows, 1)
        new = torch.addcmul(f * c, _input_gate(gates, f, *i), j)
        h = torch.mul(o, new.tanh(), out=h_t)
        if gates.cell_clip > 0:
            new = new.clamp(-gates.cell_clip, gates.cell_clip)
        c = c_t.copy_(new)
    return states, cells, all_gates, factors


def _input_gate(gates, f, i=None):
    if gates.input_gate == "coupled":
        return 1 - f
    return torch.minimum(1 - f, i) if gates.input_gate == "capped" else i


class _MogrifierLSTM(torch.autograd.Function):
    """Whatever of the gradient does not depend on later steps is computed for all steps at once.
    The loop back in time has the same few products as the loop forward. The gradients of weights
    are one product each."""

    @staticmethod
    def forward(ctx, gates, mask, x, h0, c0, *weights):
        states, cells, all_gates, factors = _forward(gates, mask, x, h0, c0, *weights)
        ctx.gates, ctx.num_weights = gates, len(weights)
        ctx.save_for_backward(mask, x, h0, c0, *weights, states, cells, all_gates, *factors)
        return states, states[-1].clone(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_h, grad_c):
        mask, x, h0, c0, *saved = ctx.saved_tensors
        weights, saved = saved[: ctx.num_weights], saved[ctx.num_weights :]
        states, cells, all_gates, *factors = saved
        weight_x, weight_h, _, *maps = weights
        rounds, dtype = _in_threes(maps), weight_h.dtype
        before = torch.cat([c0[None], cells[:-1]])
        y = torch.cat([h0[None], states[:-1]])
        if mask is not None:
            y = y * mask
        # What input and state were before each of their rounds, and after the last.
        xs, ys = [x], [y]
        for r, factor in enumerate(factors):
            scaled = ys if r % 2 else xs
            scaled.append(scaled[-1] * factor)
        # Derivatives of what a round returns with respect to the argument of its sigmoid.
        grads_z = [
            (ys if r % 2 else xs)[r // 2] * factor * (1 - factor / 2)
            for r, factor in enumerate(factors)
        ]
        grads_u = [None if a is None else x.new_empty(*x.shape[:2], len(a)) for a, _, _ in rounds]
        slopes, through, inside = _slopes(ctx.gates, all_gates, before)
        decay = all_gates.unflatten(2, slopes.shape[2:])[:, :, 1]  # f
        grad_x = torch.empty_like(x) if rounds else None
        weight = torch.cat([weight_x, weight_h], 1) if rounds else weight_h
        for t in reversed(range(len(x))):
            grad_h = grad_h + grad_states[t]
            if inside is not None:
                grad_c = grad_c * inside[t]
            grad_c = torch.addcmul(grad_c, grad_h, through[t])
            grad_gates = slopes[t]  # [B, rows, H]
            grad_gates[:, :-1].mul_(grad_c.unsqueeze(1))
            grad_gates[:, -1].mul_(grad_h)
            grad_c = grad_c * decay[t]
            grad_y = product(grad_gates.flatten(1), weight)
            if rounds:
                grad_x_t, grad_y = grad_y[:, : x.size(2)], grad_y[:, x.size(2) :]
            for r in reversed(range(len(rounds))):
                a, b, _ = rounds[r]
                grad_scaled, grad_source = (grad_y, grad_x_t) if r % 2 else (grad_x_t, grad_y)
                back = product(grads_z[r][t].mul_(grad_scaled), b)
                if a is not None:
                    back = product(grads_u[r][t].copy_(back), a)
                grad_scaled, grad_source = grad_scaled * factors[r][t], grad_source + back
                grad_x_t, grad_y = (
                    (grad_source, grad_scaled) if r % 2 else (grad_scaled, grad_source)
                )
            if rounds:
                grad_x[t] = grad_x_t
            grad_h = grad_y if mask is None else grad_y * mask
        grad_gates = slopes.flatten(2)
        if not rounds:
            grad_x = product(grad_gates, weight_x)
        gradients = [
            weight_gradient(grad_gates, xs[-1], dtype),
            weight_gradient(grad_gates, ys[-1], dtype),
            grad_gates.sum((0, 1)),
        ]
        for r, (a, _, _) in enumerate(rounds):
            source = xs[r // 2 + 1] if r % 2 else ys[r // 2]
            if a is None:
                gradients += [None, weight_gradient(grads_z[r], source, dtype)]
            else:
                u = product(source, a.t())
                gradients += [
                    weight_gradient(grads_u[r], source, dtype),
                    weight_gradient(grads_z[r], u, dtype),
                ]
            gradients.append(grads_z[r].sum((0, 1)))
        return (None, None, grad_x, grad_h, grad_c, *gradients)


def _slopes(gates, all_gates, before):
    """Derivatives within each step.

    Args:
        all_gates (Tensor): ``[T, B, rows * H]``
        before (Tensor): each ``c_(t-1)``, ``[T, B, H]``

    Returns:
        the derivatives of ``c_t`` with respect to the arguments of j, f and i, and of ``h_t`` with
        respect to that of o, ``[T, B, rows, H]``; of ``h_t`` with respect to ``c_t``,
        ``[T, B, H]``; and where ``c_t`` is within the bounds, a bool Tensor ``[T, B, H]``, or None
        without bounds
    """
    j, f, *i, o = all_gates.chunk(gates.rows, 2)
    gate = _input_gate(gates, f, *i)
    c = torch.addcmul(f * before, gate, j)
    tanh = c.tanh()
    slopes = torch.empty_like(all_gates).unflatten(2, (gates.rows, -1))
    torch.mul(gate, 1 - j * j, out=slopes[:, :, 0])
    of_f = before  # the derivative of c_t with respect to f
    if gates.input_gate == "coupled":
        of_f = before - j
    elif gates.input_gate == "capped":
        of_f = torch.where(i[0] < 1 - f, before, before - j)
    torch.mul(of_f, f * (1 - f), out=slopes[:, :, 1])
    if i:
        torch.mul(j * i[0], 1 - i[0], out=slopes[:, :, 2])
        if gates.input_gate == "capped":
            slopes[:, :, 2].mul_(i[0] < 1 - f)
    torch.mul(tanh, o * (1 - o), out=slopes[:, :, -1])
    inside = c.abs() <= gates.cell_clip if gates.cell_clip > 0 else None
    return slopes, o * (1 - tanh * tanh), inside
