"""Intervals for scores, their differences and their ranks, from seeds and blocks of text."""

import math

import numpy as np

REPEATS = 10_000
MAX_WEIGHTS = 1 << 22  # drawn at once
CONFIDENCE = 0.95


def draws(models, size, block_bytes=None, seed=0, seeds=None):
    """Draws of the bits per byte of each model, as seeds and text might have been.

    Blocks of text are drawn with replacement, the same ones for all models (bootstrap: B. Efron and
    R. Tibshirani, An Introduction to the Bootstrap, 1993). The mean over seeds is drawn from
    Student's t distribution: a bootstrap of two to five seeds covers far less than it says. A model
    with one seed is drawn as if another seed would change nothing.

    Models with the same seeds are drawn together, from the multivariate t distribution of their
    means: what a seed does to all of them, such as where in train they begin, is no uncertainty of
    a difference. The interval of the difference of two models is then that of the paired t test.

    Args:
        models (list of ndarray): bits of each seed and block, ``[seeds, blocks]``, of each model
        size (int): bytes of the text
        block_bytes (int): bytes of each block but the last, which has the rest; by default all
            blocks have the same size
        seed (int): of the random numbers
        seeds (list of tuple): which seeds the rows of each model are; by default, no two models
            have the same

    Returns:
        bits per byte, ``[models, REPEATS]``; nan for a model with a score of nan
    """
    random = np.random.RandomState(seed)
    models = [np.asarray(bits, float) for bits in models]
    blocks = models[0].shape[1]
    sizes = np.full(blocks, size / blocks if block_bytes is None else block_bytes)
    sizes[-1] = size - sizes[:-1].sum()
    values = np.empty((len(models), REPEATS))
    step = max(1, MAX_WEIGHTS // blocks)  # bounds the memory
    for first in range(0, REPEATS, step):
        drawn = random.randint(blocks, size=(min(step, REPEATS - first), blocks))
        weights = np.stack([np.bincount(row, minlength=blocks) for row in drawn])
        drawn_bytes = weights @ sizes  # fewer where the short block was drawn often
        for value, bits in zip(values, models):
            value[first : first + step] = weights @ bits.mean(0) / drawn_bytes
    effects = {}
    for number, (value, bits) in enumerate(zip(values, models)):
        count = len(bits)
        if count == 1:
            continue
        key = number if seeds is None else seeds[number]
        if key not in effects:
            scale = np.sqrt(random.chisquare(count - 1, REPEATS) / (count - 1))
            effects[key] = random.normal(size=(count, REPEATS)) / scale
        deviations = bits.sum(1) - bits.sum(1).mean()
        value += deviations @ effects[key] / size / math.sqrt(count * (count - 1))
    return values


def ends(values, confidence=CONFIDENCE):
    """Both ends of the interval that holds the given share of draws, with equal tails.

    Args:
        values (ndarray): draws, ``[..., REPEATS]``
    """
    tail = 50 * (1 - confidence)
    return np.percentile(values, [tail, 100 - tail], axis=-1)


def interval(
    bits, size, baseline=None, confidence=CONFIDENCE, seed=0, block_bytes=None, seeds=None
):
    """Bits per byte, or their difference to those of another model, with an interval; see
    :func:`draws`.

    Args:
        bits (ndarray): of each seed and block, ``[seeds, blocks]``
        size (int): bytes of the text
        baseline (ndarray): of the other model on the same blocks, ``[other seeds, blocks]``
        confidence (float): of the interval
        seed (int): of the random numbers
        block_bytes (int): bytes of each block but the last; by default all have the same size
        seeds (list of tuple): the seeds of the rows of both; by default, they share none

    Returns:
        the value, and both ends of the interval
    """
    models = [np.asarray(bits, float), *([] if baseline is None else [np.asarray(baseline, float)])]
    signs = np.array([1, -1][: len(models)])
    center = signs @ [model.mean(0).sum() for model in models]
    low, high = ends(signs @ draws(models, size, block_bytes, seed, seeds), confidence)
    return center / size, low, high


def rank_ends(values, confidence=CONFIDENCE):
    """The interval of each model's rank; 1 is the best, and nan comes last.

    Args:
        values (ndarray): draws of all models, ``[models, draws]``, the lower the better

    Returns:
        lowest and highest ranks, int arrays ``[models]``
    """
    ranks = np.asarray(values).argsort(0, kind="stable").argsort(0, kind="stable") + 1
    low, high = ends(ranks, confidence)
    return np.floor(low).astype(int), np.ceil(high).astype(int)
