"""The recurrence of a layer-normalised LSTM (J. L. Ba et al., arXiv 1607.06450, equations 20 to
22)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fairseq_sha.ops.products import loop_types, product, weight_gradient, without_autocast


def layer_norm_lstm(from_input, h0, c0, weight, norm_hidden, norm_cell, eps=1e-5):
    """Run the recurrence over a segment::

        i, f, g, o = from_input_t + LN(W h_(t-1))
        c_t = sigmoid(f) * c_(t-1) + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(LN(c_t))

    State and gates are kept in float32 or wider, whatever the type of the inputs.

    Args:
        from_input (Tensor): what the input contributes to the gates, normalised,
            ``[T, B, 4 H]``
        h0, c0 (Tensor): the state before the first step, ``[B, H]``
        weight (Tensor): ``W [4 H, H]``; the rows of i, f, g and o follow one another
        norm_hidden, norm_cell (tuple of Tensor): gain and bias of the norms, ``[4 H]`` and ``[H]``
        eps (float): of both norms

    Returns:
        all h ``[T, B, H]``, of the type of ``from_input``, and the last h and c ``[B, H]``, of the
        type of the state
    """
    wide, narrow = loop_types(from_input)
    with without_autocast(from_input):
        vectors = [vector.to(wide) for vector in (*norm_hidden, *norm_cell)]
        inputs = from_input.to(wide), h0.to(wide), c0.to(wide), weight.to(narrow), *vectors
        if torch.is_grad_enabled():
            states, h, c = _LayerNormLSTM.apply(eps, *inputs)
        else:
            states, cells, *_ = _forward(eps, *inputs)
            h, c = states[-1].clone(), cells[-1].clone()
    return states.to(from_input.dtype), h, c


def _forward(eps, from_input, h0, c0, weight, gain, bias, cell_gain, cell_bias):
    """All h and c ``[T, B, H]``; all gates and normalised products before gain and bias,
    ``[T, B, 4 H]``, and the reciprocals of their standard deviations ``[T, B, 1]``."""
    width, shape = h0.size(1), from_input.shape[:2]
    states, cells = (from_input.new_empty(*shape, width) for _ in range(2))
    all_gates = from_input + bias
    normalised = torch.empty_like(all_gates)
    scales = from_input.new_empty(*shape, 1)
    transposed = weight.t()
    h, c = h0, c0
    steps = (all_gates, normalised, scales, states, cells)
    for gates, norm, scale, h_t, c_t in zip(*(tensor.unbind() for tensor in steps)):
        norm_t, _, scale_t = torch.native_layer_norm(
            product(h, transposed), [4 * width], None, None, eps
        )
        norm.copy_(norm_t)
        scale.copy_(scale_t)
        gates.addcmul_(norm, gain)
        gates[:, : 2 * width].sigmoid_()
        gates[:, 2 * width : 3 * width].tanh_()
        gates[:, 3 * width :].sigmoid_()
        i, f, g, o = gates.chunk(4, 1)
        c = torch.addcmul(f * c, i, g, out=c_t)
        h = torch.mul(o, F.layer_norm(c, [width], cell_gain, cell_bias, eps).tanh_(), out=h_t)
    return states, cells, all_gates, normalised, scales


class _LayerNormLSTM(torch.autograd.Function):
    """Whatever of the gradient does not depend on later steps is computed for all steps at once.
    The gradient of W is one product."""

    @staticmethod
    def forward(ctx, eps, from_input, h0, c0, weight, gain, bias, cell_gain, cell_bias):
        inputs = from_input, h0, c0, weight, gain, bias, cell_gain, cell_bias
        states, cells, *saved = _forward(eps, *inputs)
        ctx.eps = eps
        vectors = weight, gain, cell_gain, cell_bias
        ctx.save_for_backward(h0, c0, *vectors, states, cells, *saved)
        return states, states[-1].clone(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_h, grad_c):
        h0, c0, weight, gain, cell_gain, cell_bias, *saved = ctx.saved_tensors
        states, cells, all_gates, normalised, scales = saved
        width = h0.size(1)
        cells_before = torch.cat([c0[None], cells[:-1]])
        i, f, g, o = all_gates.chunk(4, 2)
        # The cell's norm at all steps.
        cell_norm, _, cell_scales = torch.native_layer_norm(cells, [width], None, None, ctx.eps)
        tanh = torch.addcmul(cell_bias, cell_norm, cell_gain).tanh_()
        # Derivatives of c_t with respect to the arguments of i, f and g, and of h_t to that of o.
        slopes = torch.empty_like(all_gates)
        torch.mul(g * i, 1 - i, out=slopes[..., :width])
        torch.mul(cells_before * f, 1 - f, out=slopes[..., width : 2 * width])
        torch.mul(i, 1 - g * g, out=slopes[..., 2 * width : 3 * width])
        torch.mul(tanh * o, 1 - o, out=slopes[..., 3 * width :])
        through = o * (1 - tanh * tanh)  # of h_t with respect to the cell's norm
        grad_products = torch.empty_like(all_gates)
        grad_cell_norms = torch.empty_like(cells)
        for t in reversed(range(len(states))):
            grad_h = grad_h + grad_states[t]
            grad_norm = torch.mul(grad_h, through[t], out=grad_cell_norms[t])
            grad_c = grad_c + _through_norm(grad_norm * cell_gain, cell_norm[t], cell_scales[t])
            grad_gates = slopes[t]
            grad_gates[:, : 3 * width].unflatten(1, (3, width)).mul_(grad_c.unsqueeze(1))
            grad_gates[:, 3 * width :].mul_(grad_h)
            grad_c = grad_c * f[t]
            grad_product = _through_norm(grad_gates * gain, normalised[t], scales[t])
            grad_products[t] = grad_product
            grad_h = product(grad_product, weight)
        before = torch.cat([h0[None], states[:-1]])
        grad_weight = weight_gradient(grad_products, before, weight.dtype)
        return (
            None,
            slopes,
            grad_h,
            grad_c,
            grad_weight,
            (slopes * normalised).sum((0, 1)),
            slopes.sum((0, 1)),
            (grad_cell_norms * cell_norm).sum((0, 1)),
            grad_cell_norms.sum((0, 1)),
        )


def _through_norm(gradient, normalised, scale):
    """The gradient of what a norm without gain and bias was given, ``[B, N]``, from that of what it
    returned, the latter itself, and the reciprocal of the standard deviation ``[B, 1]``."""
    size = gradient.size(1)
    projection = (gradient * normalised).sum(1, keepdim=True) / size
    centred = gradient - gradient.mean(1, keepdim=True)
    return centred.addcmul_(normalised, projection, value=-1).mul_(scale)
