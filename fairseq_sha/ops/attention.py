"""Attention of one head over a memory and the current segment."""

import torch
import torch.nn.functional as F

from fairseq_sha.ops.dropout import dropout


def attend(queries, keys, values, p=0.0):
    """``dropout(softmax(q k^T / sqrt(H) + causal mask)) v``, the weights not renormalised.

    The rows of a memory come first in ``keys`` and ``values``, the segment's own rows last:
    position ``t`` of the segment sees the whole memory and positions 0 to ``t``.

    Args:
        queries (Tensor): ``[T, B, H]``
        keys, values (Tensor): ``[M + T, B, H]``
        p (float): dropout on the attention weights

    Returns:
        Tensor ``[T, B, H]``
    """
    if torch.is_grad_enabled() and queries.device.type == "cpu":
        # Faster than torch's fused form, whose dropout draws on one thread.
        return attend_reference(queries, keys, values, p)
    return attend_fused(queries, keys, values, p)


def attend_fused(queries, keys, values, p=0.0):
    """:func:`attend`, by torch's scaled dot product attention."""
    mixed = F.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(1) for x in (queries, keys, values)),
        attn_mask=visible(len(queries), len(keys), queries.device),
        dropout_p=p,
    )
    return mixed.squeeze(1).transpose(0, 1)


def attend_reference(queries, keys, values, p=0.0):
    """:func:`attend`, written out."""
    queries, keys, values = (x.transpose(0, 1) for x in (queries, keys, values))
    bias = torch.zeros(queries.size(1), keys.size(1), dtype=queries.dtype, device=queries.device)
    bias.masked_fill_(~visible(*bias.shape, bias.device), float("-inf"))
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=queries.size(-1) ** -0.5)
    return torch.bmm(dropout(scores.softmax(-1), p), values).transpose(0, 1)


def visible(segment, total, device):
    """Which of ``total`` rows each position of the segment sees: bool ``[segment, total]``."""
    return torch.ones(segment, total, dtype=torch.bool, device=device).tril(total - segment)
