"""Intervals for scores and their differences, from seeds and blocks of text."""

import numpy as np

REPEATS = 10_000


def interval(bits, size, baseline=None, confidence=0.95, seed=0):
    """Bits per byte, or their difference to those of another model, with a bootstrap interval
    (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Seeds of each model and blocks of text are drawn with replacement; both models are scored on the
    same blocks. With few seeds, the spread between seeds is underestimated.

    Args:
        bits (ndarray): of each seed and block, ``[seeds, blocks]``
        size (int): bytes of the text
        baseline (ndarray): of the other model on the same blocks, ``[other seeds, blocks]``
        confidence (float): of the interval
        seed (int): of the random numbers

    Returns:
        the value, and both ends of the interval
    """
    random = np.random.RandomState(seed)
    models = [np.asarray(bits, float), *([] if baseline is None else [np.asarray(baseline, float)])]
    blocks = models[0].shape[1]
    # How often each block was drawn, the same for both models.
    drawn = random.randint(blocks, size=(REPEATS, blocks))
    weights = np.stack([np.bincount(row, minlength=blocks) for row in drawn])
    values, center = 0.0, 0.0
    for sign, model in zip((1, -1), models):
        seeds = random.randint(len(model), size=(REPEATS, len(model)))
        chosen = np.stack([np.bincount(row, minlength=len(model)) for row in seeds]) / len(model)
        values = values + sign * np.einsum("rs,sb,rb->r", chosen, model, weights)
        center = center + sign * model.mean(0).sum()
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail]) / size
    return center / size, low, high
