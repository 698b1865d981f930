"""What a study found and how sure that is: sentences that follow from statistics, and from nothing else.

Runs are compared by their error over that of the run's own ``no_change`` control (of the state, over the variance that
the training mean leaves), so that tasks can be averaged. A difference is claimed only where a permutation test within
tasks finds one and it survives the control of the false discovery rate over all comparisons of the report (Benjamini
and Hochberg 1995): in a study in which nothing differs, the chance of any claim at all is about 5 %
(exactly for independent comparisons; those of one run are not).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from pvrpipe.worldmodel.report_sources import ERRORS, OWN, TASK, Evidence
from pvrpipe.worldmodel.statistics import Estimate, aggregate, probability_of_improvement

ALPHA = 0.05
#: Errors in the same units for every representation. A latent's are its own: one that hardly moves is easily predicted.
JUDGED = ("reward_error", "state_error")
EXACT, DRAWN = 20_000, 9_999  # arrangements that are all looked at; else so many of them
REFERENCE = "from scratch"
Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "unclear", "too few runs"]


@dataclass(frozen=True)
class Standing:
    """One representation at one error, over all tasks."""

    model: str
    size: str
    error: str
    horizon: int
    pvr: str
    relative: Estimate
    """interquartile mean over runs and tasks of error over control"""
    runs: int
    tasks: int


@dataclass(frozen=True)
class Comparison:
    """One representation against the reference."""

    model: str
    size: str
    error: str
    horizon: int
    pvr: str
    against: str
    improvement: Estimate
    """probability that a run of ``pvr`` has the smaller error"""
    p: float
    q: float
    """p, adjusted for all comparisons of the report"""
    verdict: Verdict


@dataclass(frozen=True)
class Findings:
    """Of all models, errors and horizons."""

    reference: str
    standings: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]


def relative_errors(evidence: Evidence, look: str = OWN) -> pl.DataFrame:
    """Open-loop errors of runs over those of their ``no_change`` control, in the column ``relative``."""
    rows = evidence.scores.filter(pl.col("measure").is_in(ERRORS), prediction="open_loop", look=look)
    keys = ["run", "measure", "horizon"]
    of = pl.when(pl.col("measure") == "state_error").then(pl.lit("mean")).otherwise(pl.lit("no_change"))
    control = rows.filter(pl.col("control") == of).select(*keys, floor="accumulated")
    return (
        rows.filter(control="model")
        .join(control, on=keys, maintain_order="left")
        .filter(pl.col("floor") > 0)
        .with_columns(relative=pl.col("accumulated") / pl.col("floor"))
    )


def findings_of(evidence: Evidence, horizons: Sequence[int]) -> Findings:
    """Where each representation stands, and which can be told from the reference.

    Args:
        evidence: of one study or several.
        horizons: that are compared.
    """
    table = relative_errors(evidence).filter(pl.col("horizon").is_in(list(horizons)))
    pvrs = table["arm"].unique(maintain_order=True).to_list()
    reference = REFERENCE if REFERENCE in pvrs or not pvrs else pvrs[0]
    standings, raw = [], []
    for (model, size, error, horizon), rows in table.group_by(
        "model", "size", "measure", "horizon", maintain_order=True
    ):
        about: dict[str, Any] = {"model": model, "size": size, "error": error, "horizon": horizon}
        by_pvr = {pvr: _by_task(rows, pvr) for pvr in pvrs if pvr in rows["arm"]}
        standings += [
            Standing(
                **about,
                pvr=pvr,
                relative=aggregate(list(tasks.values())),
                runs=sum(map(len, tasks.values())),
                tasks=len(tasks),
            )
            for pvr, tasks in by_pvr.items()
        ]
        for pvr, tasks in by_pvr.items():
            shared = [task for task in tasks if task in by_pvr.get(reference, {})]
            if pvr != reference and shared and error in JUDGED:
                ours, theirs = [tasks[t] for t in shared], [by_pvr[reference][t] for t in shared]
                raw.append((about, pvr, ours, theirs))
    ordered = sorted(standings, key=lambda s: (*_place(s), s.relative.value))
    return Findings(reference, tuple(ordered), _compared(raw, reference))


def _by_task(rows: pl.DataFrame, pvr: str) -> dict[tuple[str, ...], Floats]:
    return {
        tuple(map(str, task)): part["relative"].to_numpy()
        for task, part in rows.filter(arm=pvr).group_by(*TASK, maintain_order=True)
    }


def _compared(
    raw: Sequence[tuple[Any, str, list[Floats], list[Floats]]], reference: str
) -> tuple[Comparison, ...]:
    """Judge all comparisons together."""
    tests = [permutation_test(ours, theirs) for _, _, ours, theirs in raw]
    adjusted = stats.false_discovery_control([p for p, _ in tests]) if tests else []
    found = []
    for (about, pvr, ours, theirs), (p, least), q in zip(raw, tests, adjusted, strict=True):
        improvement = probability_of_improvement(ours, theirs, lower_is_better=True)
        verdict: Verdict = "unclear"
        if least > ALPHA:
            verdict = "too few runs"
        elif q <= ALPHA:
            verdict = "better" if improvement.value > 0.5 else "worse"
        found.append(
            Comparison(
                **about, pvr=pvr, against=reference, improvement=improvement, p=p, q=float(q), verdict=verdict
            )
        )
    return tuple(sorted(found, key=_place))


def _place(about: Standing | Comparison) -> tuple[str, int, int, int]:
    """Where it is listed: by model, by size from small to large, by error, by horizon."""
    millions = int(about.size.removesuffix("m"))
    return about.model, millions, ERRORS.index(about.error), about.horizon


def permutation_test(ours: Sequence[Floats], theirs: Sequence[Floats], seed: int = 0) -> tuple[float, float]:
    """Two-sided p of Mann and Whitney's U summed over tasks, labels permuted within each; and the least p possible.

    All arrangements are looked at where there are at most 20,000, else 9,999 drawn ones (Phipson and Smyth 2010).

    Args:
        ours: scores of each task.
        theirs: scores of each task, in the same order.
        seed: of the draws.
    """
    ranks = [stats.rankdata(np.concatenate(pair)) for pair in zip(ours, theirs, strict=True)]
    weights = [1.0 / (len(a) * len(b)) for a, b in zip(ours, theirs, strict=True)]
    middles = [len(a) * (len(r) + 1) / 2 for a, r in zip(ours, ranks, strict=True)]
    seen = sum(w * (r[: len(a)].sum() - m) for a, r, w, m in zip(ours, ranks, weights, middles, strict=True))
    ways = math.prod(math.comb(len(r), len(a)) for a, r in zip(ours, ranks, strict=True))
    if ways <= EXACT:
        sums = [
            [w * (sum(chosen) - m) for chosen in itertools.combinations(r.tolist(), len(a))]
            for a, r, w, m in zip(ours, ranks, weights, middles, strict=True)
        ]
        totals = np.array([0.0])
        for each in sums:
            totals = (totals[:, None] + np.asarray(each)).reshape(-1)
        return float(np.mean(np.abs(totals) >= abs(seen) - 1e-12)), 2 / ways
    random = np.random.default_rng(seed)
    totals = np.zeros(DRAWN)
    for a, r, w, m in zip(ours, ranks, weights, middles, strict=True):
        drawn = random.permuted(np.tile(r, (DRAWN, 1)), axis=1)[:, : len(a)]
        totals += w * (drawn.sum(1) - m)
    return float((1 + (np.abs(totals) >= abs(seen) - 1e-12).sum()) / (1 + DRAWN)), 2 / ways
