"""The gated linear recurrence ``h_t = a_t h_(t-1) + b_t`` (arXiv 2410.01201, section 3), which is
also what the gradient of the SRU recurrence obeys."""

import torch


def linear_recurrence(a, b, h0):
    """All states of ``h_t = a_t * h_(t-1) + b_t``, element by element.

    The state is kept in float32 or wider, whatever the type of the inputs.

    Args:
        a, b (Tensor): ``[T, ...]``
        h0 (Tensor): the state before the first step, ``[...]``

    Returns:
        states ``[T, ...]``, of the type of ``b``, and the last of them, of the state's type
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    states = _LinearRecurrence.apply(a.to(wide), b.to(wide), h0.to(wide))
    return states.to(b.dtype), states[-1].clone()


def linear_recurrence_reference(a, b, h0):
    """:func:`linear_recurrence`, written out."""
    wide = torch.promote_types(b.dtype, torch.float32)
    h, states = h0.to(wide), []
    for factor, term in zip(a.to(wide), b.to(wide)):
        h = factor * h + term
        states.append(h)
    return torch.stack(states).to(b.dtype), h


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, h0):
        states = scan(a, b, h0)
        ctx.save_for_backward(a, h0, states)
        return states

    @staticmethod
    def backward(ctx, gradient):
        a, h0, states = ctx.saved_tensors
        total = reverse_scan(a, gradient)
        of_a = torch.empty_like(a)
        torch.mul(total[0], h0, out=of_a[0])
        torch.mul(total[1:], states[:-1], out=of_a[1:])
        return of_a, total, total[0] * a[0]


def scan(a, b, h0, reverse=False, out=None):
    """``h_t = a_t * h_(t-1) + b_t`` from ``h0``, without gradient; backwards in time if
    ``reverse``: ``h_t = a_t * h_(t+1) + b_t``. Written to ``out``, a contiguous tensor, if given.

    On a GPU it is one Triton kernel. On CPU, where starting an operation costs little, it is one
    fused operation a step.
    """
    if a.device.type == "cuda":
        from fairseq_sha.ops.triton_kernels import scan as triton_scan

        return triton_scan(a, b, h0, reverse, out)
    return scan_step_by_step(a, b, h0, reverse, out)


def scan_step_by_step(a, b, h0, reverse=False, out=None):
    """:func:`scan` on CPU."""
    states = torch.empty_like(b, memory_format=torch.contiguous_format) if out is None else out
    steps = zip(a.unbind(), b.unbind(), states.unbind())
    for factor, term, state in reversed(list(steps)) if reverse else steps:
        h0 = torch.addcmul(term, factor, h0, out=state)
    return states


def reverse_scan(a, gradient):
    """The gradient of each ``b_t`` from that of each ``h_t``:
    ``g_t = gradient_t + a_(t+1) * g_(t+1)``."""
    total = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    total[-1] = gradient[-1]
    if len(a) > 1:
        scan(a[1:], gradient[:-1], gradient[-1], reverse=True, out=total[:-1])
    return total
