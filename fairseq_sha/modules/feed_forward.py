"""The feed-forward layer of transformers (arXiv 1706.03762, section 3.3)."""

import torch.nn.functional as F
from torch import nn

from fairseq_sha.ops import dropout


class FeedForward(nn.Module):
    """``W_2 dropout(f(W_1 h + b_1)) + b_2``

    Args:
        width (int): ``H``, of input and output
        inner (int): width of the inner layer
        p (float): dropout of the inner activations
        activation (callable): ``f``
    """

    def __init__(self, width, inner, p, activation=F.relu):
        super().__init__()
        self.p = p
        self.activation = activation
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)

    def forward(self, h, training):
        """``[..., H] -> [..., H]``; dropout only where ``training``"""
        return self.linear2(dropout(self.activation(self.linear1(h)), self.p, training))
