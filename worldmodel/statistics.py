"""How sure a comparison is: pure functions on arrays of scores.

Runs × tasks as in Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021;
google-research/rliable): interquartile means with percentile intervals of a bootstrap that is stratified over tasks,
and the probability that one method improves on another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # whose parts load when used
from numpy.typing import ArrayLike, NDArray

from pvrpipe.schemas.errors import InvalidValueError

REPEATS = 2000
CONFIDENCE = 0.95
FEW, FEWEST, DRAWN = 20, 7, 9_999  # pairs whose ranks are permuted: so many times, of the fewest in all ways
TRIMMED = 0.25  # of the scores, at either end
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Estimate:
    """A statistic and the ends of its interval; None where nothing can be said of it."""

    value: float
    low: float | None
    high: float | None
    count: int
    """numbers that it was computed from"""
    p: float | None = None
    """of no effect at all, two-sided, for correlations"""


def interquartile_mean(scores: ArrayLike) -> Floats:
    """Mean of the middle half of all scores over the last axis, as ``scipy.stats.trim_mean(·, 0.25)``."""
    ordered = np.sort(np.asarray(scores, np.float64), -1)
    cut = int(TRIMMED * ordered.shape[-1])
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def mean(scores: ArrayLike) -> Floats:
    """Over the last axis."""
    return np.asarray(scores, np.float64).mean(-1)


def standard_error(scores: ArrayLike) -> float | None:
    """Of the mean of some scores (n,); None of one."""
    values = np.asarray(scores, np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def aggregate(
    scores: Sequence[ArrayLike],
    statistic: Statistic = interquartile_mean,
    *,
    repeats: int = REPEATS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """A statistic of all scores together, with an interval of a bootstrap stratified over tasks.

    Args:
        scores: one array of scores for each task, of as many runs as there are; tasks may differ in that.
        statistic: of (repeats, n) scores over the last axis.
        repeats: of the bootstrap; each draws as many runs of every task as it has, with replacement.
        confidence: share of the repeats between the ends.
        seed: of the draws.

    Raises:
        InvalidValueError: a task has no scores, or one that is not finite.
    """
    tasks = _checked(scores)
    drawn = np.concatenate(list(_resampled(tasks, repeats, np.random.default_rng(seed))), 1)
    pooled = np.concatenate(tasks)
    low, high = _interval(statistic(drawn), confidence)
    sure = max(len(task) for task in tasks) > 1
    return Estimate(float(statistic(pooled)), low if sure else None, high if sure else None, len(pooled))


def probability_of_improvement(
    ours: Sequence[ArrayLike],
    theirs: Sequence[ArrayLike],
    *,
    lower_is_better: bool = False,
    repeats: int = REPEATS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """How likely a run of ours is better than one of theirs on the same task, averaged over tasks; a tie counts half.

    Mann and Whitney's U over the number of pairs, per task (Agarwal et al. 2021, section 4.3).

    Args:
        ours: scores of each task.
        theirs: scores of each task, in the same order.
        lower_is_better: for errors.
        repeats: of the bootstrap, which draws runs of both within each task.
        confidence: share of the repeats between the ends.
        seed: of the draws.
    """
    if len(ours) != len(theirs):
        raise InvalidValueError(
            f"{len(ours)} tasks are compared with {len(theirs)}; give the same tasks of both"
        )
    sign = -1.0 if lower_is_better else 1.0
    a, b = ([sign * task for task in _checked(side)] for side in (ours, theirs))
    random = np.random.default_rng(seed)
    drawn = zip(_resampled(a, repeats, random), _resampled(b, repeats, random), strict=True)
    repeated = np.mean([_better(x, y) for x, y in drawn], 0)
    value = np.mean([_better(x, y) for x, y in zip(a, b, strict=True)])
    low, high = _interval(repeated, confidence)
    sure = max(len(task) for task in (*a, *b)) > 1
    count = sum(map(len, a)) + sum(map(len, b))
    return Estimate(float(value), low if sure else None, high if sure else None, count)


def pearson(x: ArrayLike, y: ArrayLike, *, confidence: float = CONFIDENCE) -> Estimate:
    """Linear correlation of (n,) and (n,), its interval by Fisher's transformation; NaN where one never changes."""
    a, b = _pairs(x, y)
    if len(a) < 3 or not a.std() or not b.std():
        return Estimate(float("nan"), None, None, len(a))
    found = scipy.stats.pearsonr(a, b)
    low = high = None
    if len(a) > 3:
        low, high = map(float, found.confidence_interval(confidence))
    return Estimate(float(found.statistic), low, high, len(a), float(found.pvalue))


def spearman(x: ArrayLike, y: ArrayLike, *, confidence: float = CONFIDENCE) -> Estimate:
    """Rank correlation of (n,) and (n,), its interval by Fisher's transformation with Bonett and Wright's variance.

    Bonett and Wright (Psychometrika 2000): the transformed coefficient has variance (1 + r²/2) / (n - 3). Of few pairs
    p is that of a permutation test, where Student's t would say 0 of any three in order.
    """
    a, b = _pairs(x, y)
    if len(a) < 3 or not a.std() or not b.std():
        return Estimate(float("nan"), None, None, len(a))
    found = scipy.stats.spearmanr(a, b)
    r = float(found.statistic)
    low = high = None
    if len(a) > 3:
        reach = scipy.stats.norm.ppf((1 + confidence) / 2) * np.sqrt((1 + r * r / 2) / (len(a) - 3))
        centre = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15))
        low, high = float(np.tanh(centre - reach)), float(np.tanh(centre + reach))
    return Estimate(r, low, high, len(a), _p_of_ranks(a, b) if len(a) <= FEW else float(found.pvalue))


def _p_of_ranks(a: Floats, b: Floats, seed: int = 0) -> float:
    """Two-sided p of a rank correlation: all pairings where there are at most 5,040, else 9,999 drawn ones."""
    x, y = (scipy.stats.rankdata(values) - (len(a) + 1) / 2 for values in (a, b))
    seen = abs(x @ y) - 1e-9
    if len(a) <= FEWEST:
        return float(np.mean(np.abs(np.array(list(itertools.permutations(x))) @ y) >= seen))
    drawn = np.random.default_rng(seed).permuted(np.tile(x, (DRAWN, 1)), axis=1)
    return float((1 + (np.abs(drawn @ y) >= seen).sum()) / (1 + DRAWN))


def _better(ours: Floats, theirs: Floats) -> Floats:
    """Share of pairs that ours win: (..., n), (..., m) -> (...)."""
    above = ours[..., :, None] > theirs[..., None, :]
    same = ours[..., :, None] == theirs[..., None, :]
    return (above + 0.5 * same).mean((-2, -1))


def _resampled(tasks: Sequence[Floats], repeats: int, random: np.random.Generator) -> list[Floats]:
    """Of each task (n,) as many scores, drawn with replacement: (repeats, n)."""
    return [task[random.integers(len(task), size=(repeats, len(task)))] for task in tasks]


def _interval(repeated: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(repeated, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked(scores: Sequence[ArrayLike]) -> list[Floats]:
    tasks = [np.asarray(task, np.float64).reshape(-1) for task in scores]
    for number, task in enumerate(tasks):
        if not len(task) or not np.isfinite(task).all():
            raise InvalidValueError(
                f"task {number} of {len(tasks)} has {'no scores' if not len(task) else 'scores that are not finite'}; "
                "leave it out, and the runs that diverged"
            )
    if not tasks:
        raise InvalidValueError("there are no scores to aggregate; give those of one task at least")
    return tasks


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (np.asarray(values, np.float64).reshape(-1) for values in (x, y))
    if len(a) != len(b):
        raise InvalidValueError(f"{len(a)} numbers are correlated with {len(b)}; give pairs")
    return a, b
