"""Output heads: what the last layer's features say about the next token."""

import torch
import torch.nn.functional as F
from torch import nn


class SoftmaxHead(nn.Module):
    """``softmax(W h + b)`` over the whole vocabulary.

    A head answers three questions. Training, validation and scoring ask for :meth:`losses` only, so
    a head that can do without the logits of the whole vocabulary never computes them there.

    Args:
        width (int): ``H``
        vocabulary (int): ``V``
        tied_weight (nn.Parameter): ``W [V, H]``, shared with the embedding; None for a weight of
            its own
    """

    def __init__(self, width, vocabulary, tied_weight=None):
        super().__init__()
        self.tied = tied_weight is not None
        if self.tied:
            self.weight = tied_weight
            self.bias = nn.Parameter(torch.zeros(vocabulary))
        else:
            linear = nn.Linear(width, vocabulary)
            self.weight, self.bias = linear.weight, linear.bias

    def logits(self, features):
        """Unnormalised log-probabilities: ``[..., H] -> [..., V]``."""
        return F.linear(features, self.weight, self.bias)

    def log_probs(self, features):
        """Log-probabilities in float32 or wider: ``[..., H] -> [..., V]``."""
        return widen(self.logits(features)).log_softmax(-1)

    def losses(self, features, targets):
        """The cost of each target in nats.

        Args:
            features (Tensor): ``[..., H]``
            targets (LongTensor): ``[...]``

        Returns:
            Tensor ``[...]``, in float32 or wider
        """
        logits = widen(self.logits(features)).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def widen(x):
    """``x`` in float32, or wider if it is: half precision is too coarse for a normaliser."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
