"""Rows that a layer remembers from one segment for the next, oldest first.

A model file says which rows; what exporters and gradients need of such code stands here.
"""

import torch


def last_rows(rows, number):
    """The last ``number`` rows of a tensor, or all of them where there are fewer."""
    return rows[_larger_size(rows.size(0) - number, 0) :]


def next_memory(memory, segment, number):
    """The last ``number`` rows of memory and segment together: the memory of the next segment.

    Args:
        memory (Tensor): ``[M, B, H]``
        segment (Tensor): ``[T, B, H]``

    Returns:
        Tensor ``[min(M + T, number), B, H]``, a new one
    """
    dropped = _larger_size(memory.size(0) + segment.size(0) - number, 0)
    return torch.cat([memory[dropped:], segment[_larger_size(dropped - memory.size(0), 0) :]])


def remembers_inputs(state, training):
    """Whether a layer remembers its inputs and projects them anew for each segment, or keys and
    values themselves. These are right only where all segments are read with the same weights and
    no gradient goes through them: in evaluation without gradients.

    Args:
        state (dict): what the segments before left, or nothing
        training (bool)

    Raises:
        ValueError: the segments before were read without gradients, and this one is not
    """
    learns = training or torch.is_grad_enabled()
    if not state:
        return learns
    if learns and "keys" in state:
        raise ValueError(
            "the state holds keys and values, through which no gradient can go; read the segments "
            "before with gradients, too, or this one under torch.no_grad()"
        )
    return "keys" not in state


def next_keys_and_values(state, own, number):
    """What a layer remembers that keeps keys and values.

    Args:
        state (dict): ``keys`` and ``values`` of the segments before, ``[M, B, H]``, or nothing
        own (pair of Tensor): keys and values of this segment, ``[T, B, H]``
        number (int): how many rows to remember

    Returns:
        list of Tensor: keys and values that are remembered, ``[M, B, H]``
        dict: the state of the next segment
    """
    names = "keys", "values"
    old = [state[name] if state else rows[:0] for name, rows in zip(names, own)]
    new = [next_memory(*rows, number) for rows in zip(old, own)]
    return old, dict(zip(names, new))


def rows_to_attend(memory, segment, both):
    """Rows for attention, in the form that costs least: a pair of rows and of memory or None, see
    :class:`~fairseq_sha.modules.SingleHeadAttention`.

    While gradients are recorded, the memory is kept apart, because it needs none and the gradient
    of a concatenation would be computed for all of it. Otherwise ``both``, the concatenation that
    the next segment's memory is taken from anyway, saves making another one.
    """
    return (segment, memory) if torch.is_grad_enabled() else (both, None)


def _larger_size(a, b):
    """``max`` of two sizes. Exporters keep sizes symbolic, which ``max`` and ``len`` cannot be."""
    return torch.sym_max(a, b)
