"""Element-wise dropout that is fast on a CPU too, with masks that may be shared over dimensions."""

import numpy as np
import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


def dropout(x, p, training=True, shared=()):
    """Zero each element with probability ``p`` and scale the others so that the mean stays.

    On a GPU this is torch's dropout. On a CPU torch draws one number per element on one thread,
    which can take a quarter of a training step. There, numpy's fastest generator, seeded by
    torch's, draws 64 bits for every four elements. The probability is rounded to a multiple of
    2^-16; the scale belongs to the rounded one and is as exact as the type of ``x`` allows.

    Args:
        x (Tensor): any shape
        p (float): probability, in [0, 1)
        training (bool): whether to drop anything
        shared (tuple of int): dimensions along which all elements share one mask. ``(0,)`` with
            ``x [T, B, H]`` is variational ("locked") dropout: a mask ``[1, B, H]`` for all steps

    Returns:
        Tensor of the shape and type of ``x``; ``x`` itself where nothing is dropped
    """
    if not training or p == 0 or x.numel() == 0:
        return x
    drop = _dropout_on_cpu if x.device.type == "cpu" else _dropout_by_torch
    return drop(x, p, shared)


def _dropout_by_torch(x, p, shared):
    if not shared:
        return F.dropout(x, p, True)
    return x * F.dropout(x.new_ones(_mask_shape(x, shared)), p, True)


def _dropout_on_cpu(x, p, shared):
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    mask = torch.empty(_mask_shape(x, shared), dtype=x.dtype)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    draws = np.random.SFC64(seed).random_raw((mask.numel() + 3) // 4)
    draws = torch.from_numpy(draws.view(np.int16))[: mask.numel()].view(mask.shape)
    torch.ge(draws, dropped - _LEVELS // 2, out=mask)
    return x * mask.mul_(_LEVELS / (_LEVELS - dropped))


def _mask_shape(x, shared):
    shape = list(x.shape)
    for dimension in shared:
        shape[dimension] = 1
    return shape
