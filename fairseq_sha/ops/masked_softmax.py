"""Softmax with a soft mask, renormalised (arXiv 1905.07799, equation 4)."""

import torch

EPS = 1e-8


def masked_softmax(scores, mask):
    """``a = p / (sum(p) + 1e-8)`` with ``p = softmax(scores) * mask``, over the last dimension.

    It is computed in float32 or wider, because 1e-8 is 0 in half precision.

    Args:
        scores (Tensor): ``[B, heads, T, K]``
        mask (Tensor): ``[heads, T, K]``, in [0, 1]

    Returns:
        Tensor ``[B, heads, T, K]``, of the type of ``scores``
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    return _MaskedSoftmax.apply(scores.to(wide), mask.to(wide)).to(scores.dtype)


class _MaskedSoftmax(torch.autograd.Function):
    """Its gradient takes a third of the passes over ``[B, heads, T, K]`` that autograd makes."""

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
        # The gradient of the quotient with respect to softmax * mask.
        grad_masked = gradient - (gradient * weights).sum(-1, keepdim=True)
        grad_masked.div_(total)
        grad_mask = (grad_masked * softmax).sum(0)
        grad_softmax = grad_masked.mul_(mask)
        grad_scores = grad_softmax.sub_((grad_softmax * softmax).sum(-1, keepdim=True)).mul_(
            softmax
        )
        return grad_scores, grad_mask
