"""Attention to some of the positions before (arXiv 1904.10509, sections 4.2 and 4.3), without a
matrix of all positions by all positions.

Positions are numbered from the first key on. Queries are those of the last positions; the others
belong to the past. A position lies in block ``position div stride``.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_sha.ops.attention import attend_fused, causal_bias

# The most elements of copies of keys that are held for the gradient. More are copied again.
MAX_COPIED = 2**24


def attend_fixed(queries, keys, values, stride, summary, num_summaries):
    """Each position attends to those up to itself in its block, and to ``summary`` positions of
    each block before. Those of head ``h`` end ``(h mod num_summaries) * summary`` positions before
    the end of the block.

    Of ``T`` queries, ``T (stride + K summary / stride)`` scores are computed at most, for one block
    of queries after another. What is held for the gradient grows with ``K + T`` alone.

    Args:
        queries (Tensor): ``[T, B, heads, d]``
        keys, values (Tensor): ``[K, B, heads, d]``
        stride (int): positions of a block
        summary (int): a divisor of the stride
        num_summaries (int): at most ``stride / summary``

    Returns:
        Tensor ``[T, B, heads, d]``
    """
    old_keys, old_values = (summaries(x, stride, summary, num_summaries) for x in (keys, values))
    # Each block of queries has a copy of the summaries before it.
    copied = len(keys) // stride * len(old_keys) * keys[0].numel()
    again = torch.is_grad_enabled() and copied > MAX_COPIED
    # Split at once: the gradient of a slice would be as large as all keys.
    keys_of, values_of = keys.split(stride), values.split(stride)
    mixes = []
    for q, block in query_blocks(queries, keys, stride):
        before = block * summary
        inputs = (q, old_keys[:before], keys_of[block], old_values[:before], values_of[block])
        if again:
            mixes.append(checkpoint(_attend_to_both, *inputs, use_reentrant=False))
        else:
            mixes.append(_attend_to_both(*inputs))
    return torch.cat(mixes)


def _attend_to_both(queries, old_keys, keys, old_values, values):
    return _attend(queries, torch.cat([old_keys, keys]), torch.cat([old_values, values]))


def attend_locally(queries, keys, values, stride):
    """Each position attends to the last ``stride`` positions, itself included. Arguments as for
    :func:`attend_fixed`."""
    keys_of, values_of = keys.split(stride), values.split(stride)
    mixes = []
    for q, block in query_blocks(queries, keys, stride):
        seen = slice(max(0, block - 1), block + 1)
        mixes.append(_attend(q, torch.cat(keys_of[seen]), torch.cat(values_of[seen]), stride))
    return torch.cat(mixes)


def attend_strided(queries, keys, values, stride):
    """Each position attends to those at a distance of a multiple of ``stride``, itself included.
    Arguments as for :func:`attend_fixed`."""
    length, total = len(queries), len(keys)
    past = total - length
    # Whole blocks: [blocks, stride, ...]. What is added at the end is seen by nothing before it.
    after = -total % stride
    before = past % stride
    q = F.pad(queries, (0, 0) * 3 + (before, after)).unflatten(0, (-1, stride))
    k, v = (F.pad(x, (0, 0) * 3 + (0, after)).unflatten(0, (-1, stride)) for x in (keys, values))
    # Positions with the same remainder are a sequence of its own.
    mix = _attend(*(x.flatten(1, 2) for x in (q, k, v)))
    return mix.unflatten(1, (stride, -1)).flatten(0, 1)[before : before + length]


def attend_to_all(queries, keys, values, stride=None):
    """Each position attends to all those up to itself. Arguments as for :func:`attend_fixed`."""
    if len(queries) < len(keys):
        return _attend(queries, keys, values)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)


def summaries(x, stride, summary, num_summaries):
    """The rows that later blocks see of each whole block: ``[K, B, heads, d]`` to
    ``[(K div stride) * summary, B, heads, d]``."""
    heads = x.size(2)
    whole = x[: len(x) // stride * stride].unflatten(0, (-1, stride // summary, summary))
    part = stride // summary - 1 - torch.arange(heads, device=x.device) % num_summaries
    index = part.view(1, 1, 1, 1, heads, 1).expand(len(whole), 1, *whole.shape[2:])
    return whole.gather(1, index).flatten(0, 2)


def query_blocks(queries, keys, stride):
    """The queries of each block, and its number: a list of pairs."""
    past, total = len(keys) - len(queries), len(keys)
    edges = [past, *range((past // stride + 1) * stride, total, stride), total]
    lengths = [end - begin for begin, end in zip(edges, edges[1:])]
    return list(zip(queries.split(lengths), range(past // stride, len(edges) + past // stride)))


def _attend(queries, keys, values, same_length=None):
    """The last query sees all keys, or the last ``same_length``; each before it one fewer."""
    q, k, v = (x.flatten(1, -2) for x in (queries, keys, values))
    mix = attend_fused(q, k, v, causal_bias(q, k, same_length))
    return mix.reshape(queries.shape)
