"""The gated linear recurrence ``h_t = a_t h_(t-1) + b_t`` (arXiv 2410.01201, section 3).
The gradient of the SRU recurrence is one, too."""

import torch


def linear_recurrence(a, b, h0):
    """All states of ``h_t = a_t * h_(t-1) + b_t``, element by element.

    The state is kept in float32 or wider, whatever the type of the inputs.

    Args:
        a, b (Tensor): ``[T, ...]``
        h0 (Tensor): the state before the first step, ``[...]``

    Returns:
        states ``[T, ...]``, of the type of ``b``, and the last of them, of the type of the state
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    states = _LinearRecurrence.apply(a.to(wide), b.to(wide), h0.to(wide))
    return states.to(b.dtype), states[-1].clone()


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, h0):
        states = scan(a, b, h0)
        ctx.save_for_backward(a, h0, states)
        return states

    @staticmethod
    def backward(ctx, gradient):
        a, h0, states = ctx.saved_tensors
        grad_b = reverse_scan(a, gradient)
        grad_a = torch.empty_like(a)
        torch.mul(grad_b[0], h0, out=grad_a[0])
        torch.mul(grad_b[1:], states[:-1], out=grad_a[1:])
        return grad_a, grad_b, grad_b[0] * a[0]


def scan(a, b, h0, reverse=False, out=None):
    """``h_t = a_t * h_(t-1) + b_t`` for all t, without gradient.

    On a GPU it is one Triton kernel. On a CPU, where starting an operation costs little, each step
    is one fused operation.

    Args:
        a, b (Tensor): ``[T, ...]``
        h0 (Tensor): the state before the first step, ``[...]``
        reverse (bool): run backwards in time: ``h_t = a_t * h_(t+1) + b_t``
        out (Tensor): a contiguous tensor to write the states to, or None

    Returns:
        states ``[T, ...]``
    """
    if a.device.type == "cuda":
        from fairseq_sha.ops.triton_kernels import triton_scan

        return triton_scan(a, b, h0, reverse, out)
    return cpu_scan(a, b, h0, reverse, out)


def cpu_scan(a, b, h0, reverse=False, out=None):
    """:func:`scan` on a CPU."""
    states = torch.empty_like(b, memory_format=torch.contiguous_format) if out is None else out
    steps = zip(a.unbind(), b.unbind(), states.unbind())
    h = h0
    for a_t, b_t, h_t in reversed(list(steps)) if reverse else steps:
        h = torch.addcmul(b_t, a_t, h, out=h_t)
    return states


def reverse_scan(a, gradient):
    """The gradients of all ``b_t``, given what each ``h_t`` alone adds to the gradient:
    ``g_t = gradient_t + a_(t+1) * g_(t+1)``."""
    grad_b = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    grad_b[-1] = gradient[-1]
    if len(a) > 1:
        scan(a[1:], gradient[:-1], gradient[-1], reverse=True, out=grad_b[:-1])
    return grad_b
