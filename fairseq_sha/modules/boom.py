"""The boom layer (arXiv 1911.11423, section 3.2): a feed-forward layer without a second matrix."""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sha.ops import dropout

GELU_SLOPE = 1.702


def gelu(x):
    """The paper's form of GELU, ``x sigmoid(1.702 x)``."""
    return x * torch.sigmoid(GELU_SLOPE * x)


class Boom(nn.Module):
    """``H -> N H -> H``: a linear map, GELU, and the sum over the ``N`` chunks of width ``H``.

    Args:
        width (int): ``H``
        multiple (int): ``N``
        p (float): dropout on the activations of the wide layer
    """

    def __init__(self, width, multiple, p):
        super().__init__()
        self.width = width
        self.p = p
        self.linear = nn.Linear(width, multiple * width)

    def forward(self, x, training):
        """``[T, B, H] -> [T, B, H]``; dropout only where ``training``"""
        # gelu(x) = silu(1.702 x) / 1.702 takes one pass over the wide layer.
        weight, bias = self.linear.weight, GELU_SLOPE * self.linear.bias
        if len(x) == 1:  # in generation, where x is smaller than the weight
            x = GELU_SLOPE * x
        else:
            weight = GELU_SLOPE * weight
        chunks = F.linear(x, weight, bias).unflatten(-1, (-1, self.width))
        return dropout(F.silu(chunks), self.p, training).sum(-2) / GELU_SLOPE
