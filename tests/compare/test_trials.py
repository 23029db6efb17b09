"""The expected best of k trials, against all subsets."""

from itertools import combinations

import pytest

from fairseq_sha.compare.trials import expected_best, scores


@pytest.mark.parametrize("found", [[3.0], [2.5, 2.1, 4.0, 2.1, 8.0, 2.2, 2.3]])
def test_expected_best_is_the_mean_over_all_subsets(found):
    for count in range(1, len(found) + 1):
        best = [min(subset) for subset in combinations(found, count)]
        assert expected_best(found, count) == pytest.approx(sum(best) / len(best))


def test_failed_trials_count_like_the_worst_of_any_model():
    def trials(*bits):
        return {"trials": [{"bits": value} for value in bits]}

    models = {"a": trials(2.0, None, 3.0), "b": trials(float("nan"), 4.0), "c": trials(None)}
    assert scores(models) == {"a": [2.0, 4.0, 3.0], "b": [4.0, 4.0], "c": [4.0]}
    assert expected_best(scores(models)["a"], 1) == 3.0
    assert scores({"c": trials(None), "d": trials()}) == {}
