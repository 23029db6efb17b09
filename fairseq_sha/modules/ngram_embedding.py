"""Embeddings of the n-grams that end in each token."""

import torch
from torch import nn

from fairseq_sha.ngram_hash import ngram_rows


class NGramEmbedding(nn.Module):
    """Hashed n-gram embeddings (A. Pagnoni et al., arXiv 2412.09871, section 3.2.1). Each n-gram
    that ends in a token is hashed to a row of a table, and the rows of all lengths are summed.

    Args:
        orders (list of int): the lengths n, each at least 2
        buckets (int): rows of each length's table
        width (int): ``H``
    """

    def __init__(self, orders, buckets, width):
        super().__init__()
        self.orders = orders
        self.buckets = buckets
        self.embedding = nn.Embedding(len(orders) * buckets, width)
        # Small beside a token's own embedding of torch's initialisation, 1 / sqrt(width).
        nn.init.normal_(self.embedding.weight, std=0.1 / width**0.5)

    def forward(self, tokens, state):
        """What is to be added to the embedded tokens, ``[T, B, H]``, and the new state.

        Args:
            tokens (LongTensor): ``[T, B]``
            state (dict): ``tokens``, those before, ``[max(orders) - 1, B]``; empty at a start,
                where all tokens before are 0
        """
        length = max(self.orders) - 1
        before = state["tokens"] if state else tokens.new_zeros(length, tokens.size(1))
        text = torch.cat([before, tokens])
        # A view would keep the whole segment alive.
        after = {"tokens": text[len(text) - length :].clone()}
        rows = torch.stack(ngram_rows(text, self.orders, self.buckets), -1)
        return self.embedding(rows).sum(-2), after
