"""Bootstrap intervals against simulated data."""

import numpy as np
import pytest

from fairseq_sha.compare.intervals import interval


def simulated(random, mean, seeds=6, blocks=40, spread=20.0, noise=None):
    """Bits of blocks of 1,000 bytes, with effects of the seed and of the block."""
    noise = random.normal(0, 100, blocks) if noise is None else noise
    return 1000 * mean + random.normal(0, spread, (seeds, 1)) + noise


def test_interval_contains_the_truth_about_as_often_as_it_says():
    random = np.random.RandomState(1)
    hits = 0
    for trial in range(100):
        bits = simulated(random, 2.0)
        value, low, high = interval(bits, 40_000, seed=trial)
        assert low < value < high and value == pytest.approx(bits.mean(0).sum() / 40_000)
        hits += low < 2.0 < high
    assert 84 <= hits <= 99


def test_difference_is_paired_by_block():
    """What makes a block hard is no uncertainty of the difference."""
    random = np.random.RandomState(2)
    noise = random.normal(0, 500, 40)
    first, second = (simulated(random, mean, noise=noise, spread=2) for mean in (2.05, 2.0))
    value, low, high = interval(first, 40_000, second)
    assert value == pytest.approx(0.05, abs=0.005) and 0.04 < low < high < 0.06
    _, alone_low, alone_high = interval(first, 40_000)
    assert alone_high - alone_low > 10 * (high - low)


def test_no_difference_is_not_resolved():
    random = np.random.RandomState(3)
    noise = random.normal(0, 100, 40)
    first, second = (simulated(random, 2.0, noise=noise) for _ in range(2))
    _, low, high = interval(first, 40_000, second)
    assert low < 0 < high


def test_equals_drawing_one_sample_after_another():
    bits = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 7.0]])
    value, low, high = interval(bits, 3)
    random, samples = np.random.RandomState(9), []
    for _ in range(4000):
        seeds, blocks = random.randint(2, size=2), random.randint(3, size=3)
        samples.append(bits[seeds][:, blocks].mean(0).sum() / 3)
    assert value == pytest.approx(3.0)
    assert [low, high] == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=0.25)
