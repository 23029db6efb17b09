"""The recurrence of SRU (arXiv 1709.02755; as used by SRU++, arXiv 2102.12459, section 2)."""

import torch

from fairseq_sha.ops.linear_recurrence import reverse_scan

ELEMENTS_IN_CACHE = 2**17  # in each of a dozen tensors


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
        mask (Tensor): a dropout mask for the whole segment, ``[B, D]``, without gradient, or None

    Returns:
        o ``[T, B, D]``, of the type of ``x``, and the last c ``[B, D]``, of the type of the state
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    mask = torch.ones_like(c0) if mask is None else mask
    others = [tensor.to(wide) for tensor in (weight, bias, c0, mask)]
    if u.device.type == "cuda":
        from fairseq_sha.ops.triton_kernels import TritonSRURecurrence

        return TritonSRURecurrence.apply(u, x, *others)
    o, last = _SRURecurrence.apply(u.to(wide), x.to(wide), *others)
    return o.to(x.dtype), last


class _SRURecurrence(torch.autograd.Function):
    """On a CPU. The gates of a step need the previous state, so the forward pass is sequential. The
    gradient with respect to the states is a linear recurrence whose factors are all known."""

    @staticmethod
    def forward(ctx, u, x, weight, bias, c0, mask):
        gates, states = sru_steps(u, weight, bias, c0)
        ctx.save_for_backward(u, x, weight, c0, mask, gates, states)
        o = (states - x).mul_(mask).mul_(gates[:, :, 1]).add_(x)
        return o, states[-1].clone()

    @staticmethod
    def backward(ctx, grad_o, grad_last):
        u, x, weight, c0, mask, gates, states = ctx.saved_tensors
        grad_u, grad_x = torch.empty_like(u), torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        # A few steps at a time, so that intermediate results stay in the cache.
        steps = max(1, ELEMENTS_IN_CACHE // c0.numel())
        for start in reversed(range(0, len(u), steps)):
            now = slice(start, start + steps)
            before = torch.cat([states[start - 1 : start] if start else c0[None], states[now][:-1]])
            u0, f, r = u[now, :, 0], gates[now, :, 0], gates[now, :, 1]
            masked = grad_o[now] * mask
            through_c = masked * r
            grad_gates = grad_u[now, :, 1:]
            grad_f, grad_r = grad_gates.unbind(2)
            torch.mul(masked, states[now] - x[now], out=grad_r).mul_(r * (1 - r))
            torch.sub(grad_o[now], through_c, out=grad_x[now])
            slope = (before - u0).mul_(f * (1 - f))  # of c_t with respect to f's argument
            factor = torch.addcmul(f, slope, weight[0])  # of c_t with respect to c_(t-1)
            through_c[:-1].addcmul_(grad_r[1:], weight[1])
            through_c[-1] += grad_last
            grad_c = reverse_scan(factor, through_c)
            torch.mul(grad_c, 1 - f, out=grad_u[now, :, 0])
            torch.mul(grad_c, slope, out=grad_f)
            grad_weight += (grad_gates * before.unsqueeze(2)).sum((0, 1))
            grad_bias += grad_gates.sum((0, 1))
            grad_last = grad_c[0] * factor[0] + grad_r[0] * weight[1]
        return grad_u, grad_x, grad_weight, grad_bias, grad_last, None


def sru_steps(u, weight, bias, c0):
    """The sequential part, without gradient, in three operations a step: gates f and r
    ``[T, B, 2, D]`` and states ``[T, B, D]``."""
    gates = u[:, :, 1:] + bias
    states = torch.empty_like(u[:, :, 0], memory_format=torch.contiguous_format)
    c = c0
    for gate, u0, state in zip(gates.unbind(), u[:, :, 0].unbind(), states.unbind()):
        gate.addcmul_(weight, c.unsqueeze(1)).sigmoid_()
        c = torch.lerp(u0, c, gate[:, 0], out=state)
    return gates, states
