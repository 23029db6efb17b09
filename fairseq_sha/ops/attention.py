"""Attention over a memory and the current segment: the rows of the memory come first among keys
and values, the segment's own rows last. All heads of all streams lie side by side, ``N`` in all."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_sha.ops.dropout import dropout

# Scores held at once, over all heads of all streams: on CPU, where computing them anew for the
# gradient costs no more than writing and reading so many; elsewhere it costs a quarter.
MAX_SCORES_ON_CPU = 2**23
MAX_SCORES = 2**27
WIDEST_FUSED = 256  # width of a head


def attend(queries, keys, values, bias, p=0.0, memory=()):
    """``dropout(softmax(q k^T / sqrt(d) + bias)) v``, the weights not renormalised.

    Args:
        queries (Tensor): ``[T, N, d]``
        keys, values (Tensor): ``[K, N, d]``
        bias (Tensor): ``[T, K]`` or ``[N, T, K]``, such as :func:`causal` gives; minus infinity
            where a position must not look
        p (float): dropout on the attention weights
        memory (pair of Tensor, or nothing): keys and values that come before these and that all
            positions see, ``[M, N, d]``; given apart, they cost no gradient

    Returns:
        Tensor ``[T, N, d]``
    """
    if not prefers_products(queries):
        if memory:
            bias = F.pad(bias, (memory[0].size(0), 0))
            keys, values = (torch.cat(rows) for rows in zip(memory, (keys, values)))
        return attend_fused(queries, keys, values, bias, p)
    rows = len(keys) + (len(memory[0]) if memory else 0)
    limit = MAX_SCORES_ON_CPU if queries.device.type == "cpu" else MAX_SCORES
    some = max(1, limit // (len(queries) * rows))
    if queries.size(1) <= some:
        return attend_reference(queries, keys, values, bias, p, memory)
    # Some heads at a time, whose scores are computed anew for their gradient: those of all would
    # fill the memory.
    queries, keys, values, *memory = (x.split(some, 1) for x in (queries, keys, values, *memory))
    biases = [bias] * len(queries) if bias.dim() == 2 else bias.split(some)
    memory = [*zip(*memory)] or [()] * len(queries)
    pieces = [
        checkpoint(attend_reference, *inputs, p, old, use_reentrant=False)
        for *inputs, old in zip(queries, keys, values, biases, memory)
    ]
    return torch.cat(pieces, 1)


def prefers_products(queries):
    """Whether :func:`attend_reference` is faster than torch's fused form: in training on CPU, since
    the fused one's dropout draws on one thread; and on a GPU where heads are wide, since its
    kernels are made for narrow ones."""
    if queries.device.type == "cpu":
        return torch.is_grad_enabled()
    return queries.size(-1) > WIDEST_FUSED


def attend_fused(queries, keys, values, bias, p=0.0):
    """:func:`attend`, by torch's scaled dot product attention."""
    if bias.dim() == 3:
        # A view such as causal_relative gives may begin where CUDA kernels cannot read it.
        bias = bias.clone(memory_format=torch.contiguous_format).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(1) for x in (queries, keys, values)),
        attn_mask=bias,
        dropout_p=p,
    )
    return mixed.squeeze(1).transpose(0, 1)


def attend_reference(queries, keys, values, bias, p=0.0, memory=()):
    """:func:`attend`, written out."""
    queries, keys, values, *memory = (x.transpose(0, 1) for x in (queries, keys, values, *memory))
    queries = queries * queries.size(-1) ** -0.5
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
    if memory:
        old_keys, old_values = memory
        scores = torch.cat([torch.bmm(queries, old_keys.transpose(1, 2)), scores], -1)
    # Named, or mixed precision would take float32, which the product with the values undoes.
    weights = dropout(scores.softmax(-1, dtype=scores.dtype), p)
    if not memory:
        return torch.bmm(weights, values).transpose(0, 1)
    of_old, of_own = weights.split([old_keys.size(1), keys.size(1)], -1)
    return torch.baddbmm(torch.bmm(of_old, old_values), of_own, values).transpose(0, 1)


def causal(queries, keys, same_length=None):
    """A bias by which position ``t`` of the segment sees the memory and positions 0 to ``t``, or of
    these only the last ``same_length``: ``[T, K]``, of the type of ``queries``."""
    memory = keys.size(0) - queries.size(0)
    row = torch.arange(queries.size(0), device=queries.device).unsqueeze(1) + memory
    column = torch.arange(keys.size(0), device=queries.device)
    hidden = column > row
    if same_length is not None:
        hidden = hidden | (column <= row - same_length)
    bias = torch.zeros_like(hidden, dtype=queries.dtype)
    return bias.masked_fill(hidden, float("-inf"))


def causal_relative(queries, positions, same_length=None):
    """A bias from relative positions: ``q_t . r_(distance)``, minus infinity for what comes later.

    The scores of all distances are computed by one product; reading them with rows one shorter
    than they are, from the right place, moves row ``t`` by ``t`` columns, so that each finds its
    own distances without a copy (the shift of arXiv 1901.02860, appendix B).

    Args:
        queries (Tensor): ``[T, N, d]``, scaled
        positions (Tensor): ``r`` of the distances ``K - 1`` down to -1, ``[K + 1, heads, d]``;
            that of -1 is never seen
        same_length (int): see only so many keys, itself included; None for all

    Returns:
        Tensor ``[N, T, K]``: a view
    """
    length, total = queries.size(0), positions.size(0) - 1
    heads = queries.transpose(0, 1).unflatten(0, (-1, positions.size(1)))
    scores = torch.matmul(heads, positions.permute(1, 2, 0)).flatten(0, 1)
    row = torch.arange(length, device=scores.device).unsqueeze(1)
    column = torch.arange(total + 1, device=scores.device)
    # In row t the first T - 1 - t columns are moved out, to become the future of the row before.
    hidden = (column < length - 1 - row) | (column == total)
    if same_length is not None:
        hidden = hidden | (column < total - same_length)
    with torch.no_grad():  # a hidden score's weight is 0, and so is its gradient without our help
        scores.masked_fill_(hidden, float("-inf"))
    flat = scores.flatten(1)[:, length - 1 : length - 1 + length * total]
    return flat.unflatten(1, (length, total))


def band(scores, outside):
    """Move row ``t`` by ``t`` columns to the right: scores of a window that slides with ``t``
    become scores of all keys.

    Args:
        scores (Tensor): ``[N, T, L]``
        outside (float): what to fill in for keys outside the window

    Returns:
        Tensor ``[N, T, L + T - 1]``: a view of a padded copy
    """
    _, length, width = scores.shape
    total = width + length - 1
    # Read with rows one shorter than they are, each row begins one column later than the last.
    flat = F.pad(scores, (0, length), value=outside).flatten(1)[:, : length * total]
    return flat.unflatten(1, (length, total))


def last_rows(memory, segment, number):
    """The memory that the next segment finds: the last so many rows of memory and segment."""
    # Sizes may be unknown, while a model is exported: hence sym_max for max, and not len.
    old = torch.sym_max(memory.size(0) + segment.size(0) - number, 0)
    return torch.cat([memory[old:], segment[torch.sym_max(old - memory.size(0), 0) :]])
