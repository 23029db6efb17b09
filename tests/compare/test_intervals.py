"""Intervals against simulated data."""

import numpy as np
import pytest

from fairseq_sha.compare.intervals import draws, ends, interval, rank_ends


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
    bits = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 7.0], [1.0, 3.0, 5.0]])
    value, low, high = interval(bits, 3)
    random, samples = np.random.RandomState(9), []
    error = np.sqrt(np.var([7, 11, 9], ddof=1) / 3)
    for _ in range(20_000):
        blocks = random.randint(3, size=3)
        # Student's t with two degrees of freedom, from its definition
        t = random.normal() / np.sqrt((random.normal(size=2) ** 2).mean())
        samples.append((bits[:, blocks].mean(0).sum() + error * t) / 3)
    assert value == pytest.approx(3.0)
    assert [low, high] == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=0.15)


@pytest.mark.parametrize("seeds", [2, 3])
def test_difference_contains_the_truth_as_often_as_it_says_though_seeds_are_few(seeds):
    """A bootstrap of three seeds would contain it in three of four cases."""
    random = np.random.RandomState(4)
    hits = 0
    for trial in range(60):
        noise = random.normal(0, 300, 20)
        first, second = (
            simulated(random, mean, seeds, 20, spread=400, noise=noise) for mean in (2.05, 2.0)
        )
        _, low, high = interval(first, 20_000, second, seed=trial)
        hits += low < 0.05 < high
    assert hits >= 54


def ends_of_difference(first, second, size, seed=0):
    """The 95 % interval of the difference of two models with the same seeds."""
    names = tuple(range(len(first)))
    values = draws([first, second], size, seed=seed, seeds=[names, names])
    return ends(values[0] - values[1])


def test_what_a_seed_does_to_both_models_is_no_uncertainty_of_their_difference():
    random = np.random.RandomState(6)
    noise, effect = random.normal(0, 100, 40), random.normal(0, 300, (3, 1))
    first, second = (effect + simulated(random, m, 3, noise=noise) for m in (2.1, 2.0))
    low, high = ends_of_difference(first, second, 40_000)
    assert 0.02 < low < high < 0.18
    _, low, high = interval(first, 40_000, second)  # as if they had other seeds
    assert low < 0 < high


def test_interval_of_paired_seeds_is_that_of_the_paired_t_test():
    # Blocks are alike, so that all of the spread is that of seeds.
    seeds = np.array([[2.17, 2.21, 2.15], [2.19, 2.26, 2.19]])
    first, second = (np.repeat(1000 * bits[:, None], 10, axis=1) for bits in seeds)
    differences = seeds[0] - seeds[1]
    error = 4.303 * differences.std(ddof=1) / np.sqrt(3)  # t with two degrees of freedom
    expected = [differences.mean() - error, differences.mean() + error]
    assert ends_of_difference(first, second, 10_000) == pytest.approx(expected, abs=0.005)


def test_paired_interval_contains_the_truth_as_often_as_it_says():
    random = np.random.RandomState(8)
    hits = 0
    for trial in range(100):
        noise, effect = random.normal(0, 300, 20), random.normal(0, 400, (3, 1))
        first, second = (
            effect + simulated(random, m, 3, 20, spread=200, noise=noise) for m in (2.05, 2.0)
        )
        low, high = ends_of_difference(first, second, 20_000, seed=trial)
        hits += low < 0.05 < high
    assert 88 <= hits <= 99


def test_one_seed_gives_the_spread_of_blocks_only():
    bits = np.array([[1.0, 2.0, 4.0]])
    _, low, high = interval(bits, 3)
    assert (low, high) == (1.0, 4.0)


def test_ranks():
    random = np.random.RandomState(5)
    noise = random.normal(0, 100, 40)
    models = [simulated(random, mean, noise=noise, spread=40) for mean in (2.5, 2.0, 2.001, 3.0)]
    models.append(np.full((2, 40), np.nan))
    low, high = rank_ends(draws(models, 40_000))
    assert low.tolist() == [3, 1, 1, 4, 5] and high.tolist() == [3, 2, 2, 4, 5]


def test_short_last_block_counts_by_its_bytes():
    """A text that costs the same everywhere leaves no doubt."""
    bits = np.array([[2000.0, 2000.0, 600.0], [2000.0, 2000.0, 600.0]])
    assert interval(bits, 2300, block_bytes=1000) == pytest.approx((2.0, 2.0, 2.0))
    assert interval(bits, 2300, bits - [[100, 100, 30]], block_bytes=1000) == pytest.approx(
        [0.1] * 3
    )
