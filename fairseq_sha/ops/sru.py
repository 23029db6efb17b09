"""The recurrence of SRU (arXiv 1709.02755; as used by SRU++, arXiv 2102.12459, section 2)."""

import torch

from fairseq_sha.ops.linear_recurrence import reverse_scan

ELEMENTS_IN_CACHE = 2**17  # of each of a dozen tensors


def sru(u, x, weight, bias, c0, mask=None):
    """Run the recurrence over a segment, element by element::

        f_t = sigmoid(u1_t + v_f * c_(t-1) + b_f)
        r_t = sigmoid(u2_t + v_r * c_(t-1) + b_r)
        c_t = u0_t + (c_(t-1) - u0_t) * f_t
        o_t = x_t + (c_t - x_t) * mask * r_t

    The state is kept in float32 or wider, whatever the type of the inputs.

    Args:
        u (Tensor): ``[T, B, 3, D]``: u0, u1, u2
        x (Tensor): input of the highway connection, ``[T, B, D]``
        weight (Tensor): v_f and v_r, ``[2, D]``
        bias (Tensor): b_f and b_r, ``[2, D]``
        c0 (Tensor): the state before the first step, ``[B, D]``
        mask (Tensor): a dropout mask for the whole segment, ``[B, D]``, which gets no gradient, or
            None

    Returns:
        o ``[T, B, D]``, of the type of ``x``, and the last c ``[B, D]``, of the state's type
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    mask = torch.ones_like(c0) if mask is None else mask
    others = [tensor.to(wide) for tensor in (weight, bias, c0, mask)]
    if u.device.type == "cuda":
        from fairseq_sha.ops.triton_kernels import SRU

        return SRU.apply(u, x, *others)
    o, last = _SRU.apply(u.to(wide), x.to(wide), *others)
    return o.to(x.dtype), last


def sru_reference(u, x, weight, bias, c0, mask=None):
    """:func:`sru`, written out."""
    wide = torch.promote_types(u.dtype, torch.float32)
    mask = torch.ones_like(c0) if mask is None else mask
    u, weight, bias, c, mask = (tensor.to(wide) for tensor in (u, weight, bias, c0, mask))
    (v_f, v_r), (b_f, b_r), outputs = weight, bias, []
    for step, x_t in zip(u, x.to(wide)):
        u0, u1, u2 = step.unbind(1)
        f = torch.sigmoid(u1 + v_f * c + b_f)
        r = torch.sigmoid(u2 + v_r * c + b_r)
        c = u0 + (c - u0) * f
        outputs.append(x_t + (c - x_t) * mask * r)
    return torch.stack(outputs).to(x.dtype), c


class _SRU(torch.autograd.Function):
    """On CPU. The gates of a step need the state before it, so the forward pass is sequential. Its
    gradient with respect to the states is a linear recurrence, all factors of which are known."""

    @staticmethod
    def forward(ctx, u, x, weight, bias, c0, mask):
        gates, states = recur(u, weight, bias, c0)
        ctx.save_for_backward(u, x, weight, c0, mask, gates, states)
        o = (states - x).mul_(mask).mul_(gates[:, :, 1]).add_(x)
        return o, states[-1].clone()

    @staticmethod
    def backward(ctx, of_o, of_last):
        u, x, weight, c0, mask, gates, states = ctx.saved_tensors
        of_u, of_x = torch.empty_like(u), torch.empty_like(x)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        # A few steps at a time: what lies between is then still in the cache.
        steps = max(1, ELEMENTS_IN_CACHE // c0.numel())
        for start in reversed(range(0, len(u), steps)):
            now = slice(start, start + steps)
            before = torch.cat([states[start - 1 : start] if start else c0[None], states[now][:-1]])
            u0, f, r = u[now, :, 0], gates[now, :, 0], gates[now, :, 1]
            masked = of_o[now] * mask
            through_c = masked * r
            of_gates = of_u[now, :, 1:]
            of_f, of_r = of_gates.unbind(2)
            torch.mul(masked, states[now] - x[now], out=of_r).mul_(r * (1 - r))
            torch.sub(of_o[now], through_c, out=of_x[now])
            slope = (before - u0).mul_(f * (1 - f))  # of c_t with respect to f's argument
            factor = torch.addcmul(f, slope, weight[0])  # of c_t with respect to c_(t-1)
            through_c[:-1].addcmul_(of_r[1:], weight[1])
            through_c[-1] += of_last
            of_c = reverse_scan(factor, through_c)
            torch.mul(of_c, 1 - f, out=of_u[now, :, 0])
            torch.mul(of_c, slope, out=of_f)
            of_weight += (of_gates * before.unsqueeze(2)).sum((0, 1))
            of_bias += of_gates.sum((0, 1))
            of_last = of_c[0] * factor[0] + of_r[0] * weight[1]
        return of_u, of_x, of_weight, of_bias, of_last, None


def recur(u, weight, bias, c0):
    """The sequential part, without gradient: gates f, r ``[T, B, 2, D]`` and states ``[T, B, D]``,
    three operations a step."""
    gates = u[:, :, 1:] + bias
    states = torch.empty_like(u[:, :, 0], memory_format=torch.contiguous_format)
    c = c0
    for gate, u0, state in zip(gates.unbind(), u[:, :, 0].unbind(), states.unbind()):
        gate.addcmul_(weight, c.unsqueeze(1)).sigmoid_()
        c = torch.lerp(u0, c, gate[:, 0], out=state)
    return gates, states
