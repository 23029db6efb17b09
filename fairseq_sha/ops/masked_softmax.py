"""Softmax with a soft mask, renormalised (arXiv 1905.07799, equation 4)."""

import torch

EPS = 1e-8


def masked_softmax(scores, mask):
    """``a = p / (sum(p) + 1e-8)`` with ``p = softmax(scores) * mask``, over the last dimension.

    It is computed in float32 or wider: in half precision the small number would be 0.

    Args:
        scores (Tensor): ``[B, heads, T, K]``
        mask (Tensor): ``[heads, T, K]``, in [0, 1]

    Returns:
        Tensor ``[B, heads, T, K]``, of the type of ``scores``
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    return _MaskedSoftmax.apply(scores.to(wide), mask.to(wide)).to(scores.dtype)


def masked_softmax_reference(scores, mask):
    """:func:`masked_softmax`, written out."""
    masked = scores.softmax(-1) * mask
    return masked / (masked.sum(-1, keepdim=True) + EPS)


class _MaskedSoftmax(torch.autograd.Function):
    """The gradient in a third of the passes over ``[B, heads, T, K]`` that autograd makes."""

    @staticmethod
    def forward(ctx, scores, mask):
        softmax = scores.softmax(-1)
        weights = softmax * mask
        total = weights.sum(-1, keepdim=True).add_(EPS)
        weights.div_(total)
        ctx.save_for_backward(softmax, mask, weights, total)
        return weights

    @staticmethod
    def backward(ctx, gradient):
        softmax, mask, weights, total = ctx.saved_tensors
        # Of softmax * mask: the quotient's gradient.
        of_masked = gradient - (gradient * weights).sum(-1, keepdim=True)
        of_masked.div_(total)
        of_mask = (of_masked * softmax).sum(0)
        of_softmax = of_masked.mul_(mask)
        of_scores = of_softmax.sub_((of_softmax * softmax).sum(-1, keepdim=True)).mul_(softmax)
        return of_scores, of_mask
