"""The recurrence of a layer-normalised LSTM (J. L. Ba et al., arXiv 1607.06450, equations 20 to
22)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fairseq_sha.ops.products import (
    add_product,
    loop_types,
    product,
    transposed,
    weight_gradient,
    without_autocast,
)

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


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
    """All h and c ``[T, B, H]``; all gates and all ``W h`` ``[T, B, 4 H]``."""
    width = h0.size(1)
    all_gates = from_input.clone(memory_format=torch.contiguous_format)
    products = torch.zeros_like(all_gates)
    states, cells = (h0.new_empty(*from_input.shape[:2], width) for _ in range(2))
    weight = transposed(weight, len(from_input))
    h, c = h0, c0
    steps = zip(*(tensor.unbind() for tensor in (products, all_gates, states, cells)))
    for product_t, gates, h_t, c_t in steps:
        add_product(product_t, h, weight)
        gates.add_(F.layer_norm(product_t, [4 * width], gain, bias, eps))
        gates[:, : 2 * width].sigmoid_()
        i, f, g, o = gates.chunk(4, 1)
        g.tanh_()
        o.sigmoid_()
        c = torch.mul(f, c, out=c_t).addcmul_(i, g)
        h = torch.mul(o, F.layer_norm(c, [width], cell_gain, cell_bias, eps).tanh_(), out=h_t)
    return states, cells, all_gates, products


class _LayerNormLSTM(torch.autograd.Function):
    """Whatever of the gradient does not depend on later steps is computed for all steps at once.
    The gradients of W and of the norms are one operation each."""

    @staticmethod
    def forward(ctx, eps, from_input, h0, c0, weight, *vectors):
        states, cells, *saved = _forward(eps, from_input, h0, c0, weight, *vectors)
        ctx.eps = eps
        ctx.save_for_backward(h0, c0, weight, *vectors, states, cells, *saved)
        return states, states[-1].clone(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_h, grad_c):
        h0, c0, weight, gain, bias, cell_gain, cell_bias, *saved = ctx.saved_tensors
        states, cells, all_gates, products = saved
        width = h0.size(1)
        product_norm, _ = _Norm.of(products, gain, bias, ctx.eps)
        cell_norm, normalised_cells = _Norm.of(cells, cell_gain, cell_bias, ctx.eps)
        i, f, g, o = all_gates.chunk(4, 2)
        tanh = normalised_cells.tanh_()
        # Derivatives of c_t with respect to the arguments of i, f and g, and of h_t to that of o.
        slopes = torch.empty_like(all_gates)
        of_i, of_f, of_g, of_o = slopes.chunk(4, 2)
        sigmoid_backward(g, i, grad_input=of_i)
        sigmoid_backward(torch.cat([c0[None], cells[:-1]]), f, grad_input=of_f)
        tanh_backward(i, g, grad_input=of_g)
        sigmoid_backward(tanh, o, grad_input=of_o)
        # Of h_t with respect to the cell's norm; then the gradient of that norm's output.
        grad_cell_norms = torch.ops.aten.tanh_backward(o, tanh)
        grad_products = torch.empty_like(all_gates)
        of_cell = slopes.unflatten(2, (4, width))[:, :, :3]
        tensors = grad_states, grad_cell_norms, slopes, of_cell, of_o, f, grad_products
        steps = list(enumerate(zip(*(tensor.unbind() for tensor in tensors))))
        for t, (grad_h_t, grad_norm, gates, of_c, of_h, f_t, grad_product) in reversed(steps):
            grad_h = grad_h + grad_h_t
            grad_c = grad_c + cell_norm.backward(t, grad_norm.mul_(grad_h))
            of_c.mul_(grad_c.unsqueeze(1))
            of_h.mul_(grad_h)
            grad_c = grad_c * f_t
            grad_product.copy_(product_norm.backward(t, gates))
            grad_h = product(grad_product, weight)
        before = torch.cat([h0[None], states[:-1]])
        grad_weight = weight_gradient(grad_products, before, weight.dtype)
        of_norms = *product_norm.of_parameters(slopes), *cell_norm.of_parameters(grad_cell_norms)
        return None, slopes, grad_h, grad_c, grad_weight, *of_norms


class _Norm:
    """The gradients of a layer normalisation of all steps.

    Args:
        x (Tensor): what is normalised, ``[T, B, N]``
        gain, bias (Tensor): ``[N]``
        statistics (list of Tensor): mean and reciprocal standard deviation, ``[T, B, 1]``
    """

    @classmethod
    def of(cls, x, gain, bias, eps):
        """Normalise: the gradients' :class:`_Norm`, and the output ``[T, B, N]``."""
        output, *statistics = torch.native_layer_norm(x, gain.shape, gain, bias, eps)
        return cls(x, gain, bias, statistics), output

    def __init__(self, x, gain, bias, statistics):
        self.x, self.vectors, self.statistics = x, (gain, bias), statistics
        self.steps = list(zip(*(tensor.unbind() for tensor in (x, *statistics))))

    def backward(self, t, gradient):
        """The gradient of step ``t`` of ``x``, ``[B, N]``, from that of the output."""
        x, *statistics = self.steps[t]
        return self._backward(gradient, x, statistics, [True, False, False])[0]

    def of_parameters(self, gradient):
        """The gradients of gain and bias from that of the output ``[T, B, N]``."""
        return self._backward(gradient, self.x, self.statistics, [False, True, True])[1:]

    def _backward(self, gradient, x, statistics, wanted):
        return torch.ops.aten.native_layer_norm_backward(
            gradient, x, self.vectors[0].shape, *statistics, *self.vectors, wanted
        )
