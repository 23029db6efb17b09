"""Single-headed attention over a memory (arXiv 1911.11423, section 3.1)."""

import torch
from torch import nn

from fairseq_sha.modules.overparameterised_vector import OverparameterisedVector
from fairseq_sha.ops import attend, causal_bias, dropout


class SingleHeadAttention(nn.Module):
    """Attention in which only the queries have a matrix.

    Keys and values are the memory itself, gated by one vector each. The gates are the same for all
    rows and therefore commute with the products: the key gate is applied to the queries and the
    value gate to the mix. The only thing of size window x width that is computed is the dropout of
    the values in training.

    Args:
        width (int): ``H``
        p (float): dropout on queries, attention weights, values and the output
        overparameterised (bool): the value gate is an :class:`OverparameterisedVector`; else the
            sigmoid of a plain vector, as the other gates are
        collapsed (bool): hold only the constant value of the over-parameterised vector
    """

    def __init__(self, width, p, overparameterised=True, collapsed=False):
        super().__init__()
        self.p = p
        self.query = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width, eps=1e-12)
        self.query_gate = nn.Parameter(torch.zeros(width))
        self.key_gate = nn.Parameter(torch.zeros(width))
        if overparameterised:
            self.value_gate = OverparameterisedVector(width, collapsed)
        else:
            self.value_gate = nn.Parameter(torch.zeros(width))

    def forward(self, h, rows, memory, training):
        """
        Args:
            h (Tensor): ``[T, B, H]``
            rows (Tensor): rows to attend to, ``[K, B, H]``; the last T are the segment's own, of
                which position t sees those up to its own
            memory (Tensor): rows that come before these, ``[M, B, H]``, without gradient, or None
            training (bool): whether to apply dropout

        Returns:
            Tensor ``[T, B, H]``, to be added to ``h``
        """
        queries = torch.sigmoid(self.query_gate) * self.query_norm(self.query(h))
        queries = dropout(queries, self.p, training) * torch.sigmoid(self.key_gate)
        values = dropout(rows, self.p, training)
        remembered = () if memory is None else (memory, dropout(memory, self.p, training))
        p = self.p if training else 0.0
        mix = attend(queries, rows, values, causal_bias(queries, rows), p, remembered)
        if isinstance(self.value_gate, OverparameterisedVector):
            value_gate = self.value_gate()
        else:
            value_gate = torch.sigmoid(self.value_gate)
        return dropout(mix * value_gate, self.p, training)
