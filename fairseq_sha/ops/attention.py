"""Attention over a memory and the current segment.

The first rows of keys and values belong to the memory, the last ones to the segment itself. The
heads of all streams lie side by side: ``N`` in all.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_sha.ops.dropout import dropout

# The most scores that are held at once, over all heads of all streams. Recomputing more than these
# for the gradient costs a CPU no more than writing and reading them. It costs a GPU a quarter.
MAX_SCORES_ON_CPU = 2**23
MAX_SCORES = 2**27
WIDEST_FUSED = 256  # width of a head


def attend(queries, keys, values, bias, p=0.0, memory=()):
    """``dropout(softmax(q k^T / sqrt(d) + bias)) v``. Weights are not renormalised after dropout.

    Args:
        queries (Tensor): ``[T, N, d]``
        keys, values (Tensor): ``[K, N, d]``
        bias (Tensor): ``[T, K]`` or ``[N, T, K]``, such as :func:`causal_bias` gives; minus
            infinity where a position must not look
        p (float): dropout on the attention weights
        memory (tuple of Tensor): keys and values ``[M, N, d]`` that come before these and that all
            positions see, or nothing; kept apart, they cost no gradient

    Returns:
        Tensor ``[T, N, d]``
    """
    if not _unfused_is_faster(queries):
        if memory:
            bias = F.pad(bias, (memory[0].size(0), 0))
            keys, values = (torch.cat(rows) for rows in zip(memory, (keys, values)))
        return attend_fused(queries, keys, values, bias, p)
    total = len(keys) + (len(memory[0]) if memory else 0)
    limit = MAX_SCORES_ON_CPU if queries.device.type == "cpu" else MAX_SCORES
    heads = max(1, limit // (len(queries) * total))
    if queries.size(1) <= heads:
        return attend_unfused(queries, keys, values, bias, p, memory)
    # The scores of all heads would fill the memory. Take some heads at a time, and recompute their
    # scores for the gradient.
    queries, keys, values, *memory = (x.split(heads, 1) for x in (queries, keys, values, *memory))
    biases = [bias] * len(queries) if bias.dim() == 2 else bias.split(heads)
    memories = [*zip(*memory)] or [()] * len(queries)
    pieces = [
        checkpoint(attend_unfused, *inputs, p, remembered, use_reentrant=False)
        for *inputs, remembered in zip(queries, keys, values, biases, memories)
    ]
    return torch.cat(pieces, 1)


def _unfused_is_faster(queries):
    """Whether :func:`attend_unfused` is faster than torch's fused kernels. It is for training on a
    CPU, where their dropout draws on one thread, and for wide heads on a GPU, because they are made
    for narrow ones."""
    if queries.device.type == "cpu":
        return torch.is_grad_enabled()
    return queries.size(-1) > WIDEST_FUSED


def attend_fused(queries, keys, values, bias, p=0.0):
    """:func:`attend` by torch's scaled dot-product attention."""
    if bias.dim() == 3:
        # A view such as causal_relative_bias gives may begin where CUDA kernels cannot read it.
        bias = bias.clone(memory_format=torch.contiguous_format).unsqueeze(1)
    mix = F.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(1) for x in (queries, keys, values)),
        attn_mask=bias,
        dropout_p=p,
    )
    return mix.squeeze(1).transpose(0, 1)


def attend_unfused(queries, keys, values, bias, p=0.0, memory=()):
    """:func:`attend` by matrix products and a softmax."""
    queries, keys, values, *memory = (x.transpose(0, 1) for x in (queries, keys, values, *memory))
    queries = queries * queries.size(-1) ** -0.5
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
    if memory:
        old_keys, old_values = memory
        scores = torch.cat([torch.bmm(queries, old_keys.transpose(1, 2)), scores], -1)
    # Without a type, autocast would compute in float32, only for the product to round again.
    weights = dropout(scores.softmax(-1, dtype=scores.dtype), p)
    if not memory:
        return torch.bmm(weights, values).transpose(0, 1)
    old_weights, own_weights = weights.split([old_keys.size(1), keys.size(1)], -1)
    mix = torch.baddbmm(torch.bmm(old_weights, old_values), own_weights, values)
    return mix.transpose(0, 1)


def causal_bias(queries, keys, same_length=None):
    """A bias by which position ``t`` of the segment sees the memory and positions 0 to ``t``, or
    only the last ``same_length`` of these: ``[T, K]``, of the type of ``queries``."""
    memory = keys.size(0) - queries.size(0)
    row = torch.arange(queries.size(0), device=queries.device).unsqueeze(1) + memory
    column = torch.arange(keys.size(0), device=queries.device)
    hidden = column > row
    if same_length is not None:
        hidden = hidden | (column <= row - same_length)
    bias = torch.zeros_like(hidden, dtype=queries.dtype)
    return bias.masked_fill(hidden, float("-inf"))


def causal_relative_bias(queries, positions, same_length=None):
    """The part of the attention scores that depends on relative positions, with minus infinity for
    positions that come later.

    These are the terms (b) and (d) of Transformer-XL's ``A^rel_(i,j)`` (arXiv 1901.02860, section
    3.3), ``q_i . r_(i-j)``. They are computed as in its appendix B: one product gives the scores of
    all queries for all distances, and row ``i`` of these is shifted to the left by ``T - 1 - i``
    columns. Here the shift copies nothing: the scores are read from element ``T - 1`` on, with rows
    that are one element shorter.

    Args:
        queries (Tensor): ``[T, N, d]``, scaled, with the bias of term (d) added
        positions (Tensor): ``r`` of the distances ``K - 1`` down to -1, ``[K + 1, heads, d]``;
            that of -1 is never seen
        same_length (int): how many keys a query sees, itself included; None for all

    Returns:
        Tensor ``[N, T, K]``: a view
    """
    length, total = queries.size(0), positions.size(0) - 1
    heads = queries.transpose(0, 1).unflatten(0, (-1, positions.size(1)))
    scores = torch.matmul(heads, positions.permute(1, 2, 0)).flatten(0, 1)
    row = torch.arange(length, device=scores.device).unsqueeze(1)
    column = torch.arange(total + 1, device=scores.device)
    # The shift moves the first T - 1 - i columns of row i to the end of the row before, where they
    # stand for later positions.
    hidden = (column < length - 1 - row) | (column == total)
    if same_length is not None:
        hidden = hidden | (column < total - same_length)
    with torch.no_grad():  # softmax makes the gradient of a hidden score 0 by itself
        scores.masked_fill_(hidden, float("-inf"))
    flat = scores.flatten(1)[:, length - 1 : length - 1 + length * total]
    return flat.unflatten(1, (length, total))


def skew(scores, outside):
    """Shift row ``t`` by ``t`` columns to the right: the scores of a window that moves with ``t``
    become the scores of all keys.

    Args:
        scores (Tensor): ``[N, T, L]``
        outside (float): value for the keys outside the window

    Returns:
        Tensor ``[N, T, L + T - 1]``: a view of a padded copy
    """
    _, length, width = scores.shape
    total = width + length - 1
    # Read with rows that are one element shorter, each row begins one column later than the last.
    flat = F.pad(scores, (0, length), value=outside).flatten(1)[:, : length * total]
    return flat.unflatten(1, (length, total))
