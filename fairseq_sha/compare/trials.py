"""What the trials of a tuning stage say: how good the best of k of them can be expected to be."""

import math


def expected_best(scores, count):
    """The expected lowest score of ``count`` trials, drawn without replacement from those made.

    This is the unbiased estimator of R. Tang et al., "Showing Your Work Doesn't Always Work", 2020
    (arXiv 2004.13705).

    Args:
        scores (list of float): of all trials; the lower the better
        count (int): from 1 to the number of trials
    """
    scores = sorted(scores)
    subsets = math.comb(len(scores), count)
    # The i-th best is the best of those subsets whose other members all come after it.
    return sum(
        score * (math.comb(len(scores) - i, count - 1) / subsets)
        for i, score in enumerate(scores, 1)
    )


def is_failed(trial):
    """Whether a trial has no score, or diverged."""
    return trial["bits"] is None or not math.isfinite(trial["bits"])


def scores(models):
    """Bits of all trials of each model. A failed trial counts like the worst trial of any model.

    Args:
        models (dict): of each model, a dict with ``trials``

    Returns:
        dict of lists, without models if no trial of any finished
    """
    finished = [t["bits"] for m in models.values() for t in m["trials"] if not is_failed(t)]
    if not finished:
        return {}
    worst = max(finished)
    return {
        name: [worst if is_failed(trial) else trial["bits"] for trial in model["trials"]]
        for name, model in models.items()
        if model["trials"]
    }
