"""Statistics of scores against rliable, scipy, and what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel.statistics import (
    aggregate,
    interquartile_mean,
    mean,
    pearson,
    probability_of_improvement,
    spearman,
    standard_error,
)

#: Runs × tasks, and what rliable 1.2.0 (arch 7.2.0) says of them with 50,000 and 20,000 repeats.
OURS = np.array(
    [
        [1.67, 1.34, 1.15, 1.75, 1.11], [2.38, 1.81, 1.63, 0.46, 0.24], [0.51, 1.88, 1.6, 0.37, 1.86],
        [0.83, 0.83, 3.09, 1.53, 1.75], [1.77, 0.36, 1.83, 5.81, 0.55], [2.53, 2.71, 2.69, 0.94, 1.14],
    ]
)  # fmt: skip
THEIRS = np.array(
    [
        [1.06, 1.93, 4.13, 1.34, 0.69], [2.04, 3.22, 1.73, 5.01, 1.8], [2.02, 1.1, 1.66, 3.16, 3.19],
        [3.93, 3.04, 2.66, 0.68, 1.25], [7.07, 1.48, 2.89, 1.91, 2.93], [2.07, 1.14, 1.29, 2.43, 1.51],
    ]
)  # fmt: skip
IQM, IQM_INTERVAL = 1.481875, (1.169375, 1.78875)
IMPROVEMENT, IMPROVEMENT_INTERVAL = 0.31111111, (0.17777778, 0.45555556)


def test_interquartile_mean_and_its_stratified_interval_are_those_of_rliable() -> None:
    found = aggregate(list(OURS.T), repeats=20_000)
    assert found.value == pytest.approx(IQM, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(IQM_INTERVAL, abs=0.015)
    assert found.count == OURS.size


def test_probability_of_improvement_is_that_of_rliable() -> None:
    found = probability_of_improvement(list(OURS.T), list(THEIRS.T), repeats=20_000)
    assert found.value == pytest.approx(IMPROVEMENT, abs=1e-7)
    assert (found.low, found.high) == pytest.approx(IMPROVEMENT_INTERVAL, abs=0.012)
    errors = probability_of_improvement(list(OURS.T), list(THEIRS.T), lower_is_better=True)
    assert errors.value == pytest.approx(1 - IMPROVEMENT, abs=1e-7)
    assert probability_of_improvement([[1, 2]], [[1, 3]]).value == 1.5 / 4  # a tie counts half


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 40])
def test_interquartile_mean_is_scipys_trimmed_mean(count: int) -> None:
    scores = np.random.default_rng(count).normal(size=(3, count))
    np.testing.assert_allclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=-1))


def test_the_interval_is_that_of_scipys_bootstrap_where_tasks_have_unequal_runs() -> None:
    random = np.random.default_rng(3)
    tasks = [random.normal(size=5), random.normal(4, 2, size=9), random.normal(-2, 0.1, size=3)]
    ours = aggregate(tasks, mean, repeats=20_000)
    theirs = stats.bootstrap(
        tasks,
        lambda *drawn, axis: np.concatenate(drawn, axis).mean(axis),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of normal scores in three tasks the mean is known; 95 of 100 intervals should hold it, few runs a little less."""
    random, truth, held = np.random.default_rng(0), np.array([0.0, 1.0, 5.0]), 0
    for trial in range(300):
        found = aggregate([random.normal(m, 1, 20) for m in truth], mean, repeats=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth.mean() <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_correlations_are_those_of_scipy_and_their_intervals_widen_with_fewer_points() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=40)
    y = x + random.normal(size=40)
    linear, ranks = pearson(x, y), spearman(x, y)
    known = stats.pearsonr(x, y)
    assert (linear.value, linear.p) == pytest.approx((known.statistic, known.pvalue))
    assert (linear.low, linear.high) == pytest.approx(tuple(known.confidence_interval()))
    assert ranks.value == pytest.approx(stats.spearmanr(x, y).statistic)
    reach = 1.959964 * np.sqrt((1 + ranks.value**2 / 2) / 37)
    assert ranks.high == pytest.approx(np.tanh(np.arctanh(ranks.value) + reach), abs=1e-6)
    assert ranks.p == pytest.approx(stats.spearmanr(x, y).pvalue)
    fewer = spearman(x[:10], y[:10])
    assert fewer.high is not None
    assert fewer.low is not None
    assert fewer.high - fewer.low > ranks.high - ranks.low


def test_few_ranks_are_permuted_and_three_in_order_prove_nothing() -> None:
    assert spearman([1, 2, 3], [10, 20, 40]).p == pytest.approx(1 / 3)
    random = np.random.default_rng(11)
    for n in (4, 6, 12):
        x, y = random.integers(0, 9, n).astype(float), random.normal(size=n)  # with ties
        known = stats.permutation_test(
            (x,), lambda x, y=y: stats.spearmanr(x, y).statistic, permutation_type="pairings", rng=3
        )
        assert spearman(x, y).p == pytest.approx(known.pvalue, abs=1e-9 if n < 8 else 0.02)


def test_a_p_that_was_drawn_is_never_zero() -> None:
    """The order that was seen is one of those drawn (Phipson and Smyth 2010)."""
    assert spearman(range(12), range(12)).p == pytest.approx(1e-4, rel=1e-9)


def test_what_cannot_be_said_is_not_said() -> None:
    assert np.isnan(pearson([1, 2, 3, 4], [5, 5, 5, 5]).value)
    assert pearson([1, 2, 4], [1, 3, 4]).low is None
    assert standard_error([2.0]) is None
    assert standard_error([1.0, 3.0]) == 1.0
    alone = aggregate([[1.0], [3.0]])
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    with pytest.raises(InvalidValueError, match="task 1 of 2 has scores that are not finite"):
        aggregate([[1.0], [float("nan")]])
    with pytest.raises(InvalidValueError, match="task 0 of 1 has no scores"):
        aggregate([[]])
    with pytest.raises(InvalidValueError, match="the same tasks"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])
    with pytest.raises(InvalidValueError, match="give pairs"):
        spearman([1.0], [1.0, 2.0])


def test_no_difference_is_not_claimed_and_a_planted_one_is() -> None:
    random = np.random.default_rng(5)
    same = probability_of_improvement(random.normal(size=(4, 8)), random.normal(size=(4, 8)))
    better = probability_of_improvement(random.normal(1.5, 1, size=(4, 8)), random.normal(size=(4, 8)))
    assert same.low is not None
    assert same.high is not None
    assert better.low is not None
    assert same.low < 0.5 < same.high
    assert better.low > 0.5
    assert better.value == pytest.approx(stats.norm.cdf(1.5 / np.sqrt(2)), abs=0.1)
