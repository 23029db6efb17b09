"""Matrix products inside loops over time, in half precision where that is fast."""

import contextlib

import torch


def loop_types(x):
    """The types that a loop over time computes in, for an input ``x``: of states and element-wise
    operations, float32 or wider; and of matrix products. On a GPU these follow autocast or the
    input. On a CPU, whose products of a few rows are no faster in half precision, they are wide."""
    wide = torch.promote_types(x.dtype, torch.float32)
    device = x.device.type
    if device == "cpu":
        return wide, wide
    return wide, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x):
    """A context in which operations on the device of ``x`` keep the types of their inputs."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def transposed(weight, steps):
    """The transpose of a matrix for a loop of ``steps`` products. Each of them is faster with a
    contiguous one, but the copy takes longer than a single product."""
    return weight.t().contiguous() if steps > 1 else weight.t()


def product(x, weight):
    """``x @ weight`` in the type of the weight, returned in the type of ``x``."""
    return (x.to(weight.dtype) @ weight).to(x.dtype)


def add_product(out, x, weight):
    """``out += x @ weight``, of two dimensions each, with the product in the type of the weight."""
    if weight.dtype == out.dtype:
        out.addmm_(x, weight)
    else:
        out.add_(x.to(weight.dtype) @ weight)


def weight_gradient(grad_out, x, dtype):
    """The gradient of ``W`` in ``out = W x``, as one product over all steps and streams.

    Args:
        grad_out (Tensor): ``[T, B, O]``
        x (Tensor): ``[T, B, I]``
        dtype (torch.dtype): of the product and of the result

    Returns:
        Tensor ``[O, I]``
    """
    return grad_out.flatten(0, 1).to(dtype).t() @ x.flatten(0, 1).to(dtype)
