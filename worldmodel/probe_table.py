"""The table of a probe, ``probe.parquet``, one row per episode, measure and horizon; and what is said of it.

Every number of ``metrics.json`` is computed from this table. Its columns are in ``docs/probes.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from pvrpipe.worldmodel.probe_dynamics import CONTROLS, PREDICTIONS, Judged

Floats = NDArray[np.float64]
OF_EPISODE = ("episode", "split", "distribution", "variation", "policy", "episode_return")
VALUES = ("accumulated", "per_step")
LONGEST = 2**31 - 1  # horizon that the column holds
STRATA = 3  # of the values of a factor


def horizons_of(wanted: Sequence[int], longest: int) -> list[int]:
    """The horizons asked for, and between them powers of two, from which an error's growth is seen."""
    powers = [1 << power for power in range(max(1, min(max(wanted), longest)).bit_length())]
    return sorted({*wanted, *powers})


def accumulate(values: Floats, steps: NDArray[np.int64], horizons: Sequence[int]) -> Floats:
    """Sums of each episode's values over its first rows.

    Args:
        values: (N, T).
        steps: (N,), how many of an episode's rows exist, at least 1.
        horizons: (H,), rows to sum, or as many as there are.

    Returns:
        (N, H).
    """
    exists = np.arange(values.shape[1]) < steps[:, None]
    total = np.where(exists, values, 0.0).cumsum(1)
    return np.take_along_axis(total, np.minimum(steps[:, None], np.asarray(horizons)) - 1, 1)


def table_of(judged: Judged, episodes: pl.DataFrame, horizons: Sequence[int]) -> pl.DataFrame:
    """Tidy rows of some episodes.

    Args:
        judged: what was measured of them.
        episodes: their rows of the store's episode table, in the same order.
        horizons: to accumulate over.
    """
    N, H = len(episodes), len(horizons)
    about = episodes.select(*OF_EPISODE, pl.col("^factor_.*$"), pl.col("^success$"))
    steps = np.minimum(judged.steps[:, None], np.asarray(horizons))
    totals = [accumulate(values, judged.steps, horizons) for values in judged.values.values()]
    M = len(totals)
    names = [np.repeat(np.array(column), N * H) for column in zip(*judged.values, strict=True)]
    return about[np.tile(np.repeat(np.arange(N), H), M)].with_columns(
        prediction=names[0],
        control=names[1],
        measure=names[2],
        horizon=np.tile(np.asarray(horizons, np.int32), N * M),
        steps=np.tile(steps.reshape(-1).astype(np.int32), M),
        accumulated=np.stack(totals).reshape(-1),
        per_step=(np.stack(totals) / steps).reshape(-1),
    )


def entries(table: pl.DataFrame, horizons: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and standard error over episodes, by prediction, measure and horizon; controls beside the model.

    Returns:
        ``{"open_loop": {"reward_error": {"33": {"accumulated": {"mean": …, "sem": …}, "per_step": {…},
        "shuffled_actions": {"accumulated": {…}, "per_step": {…}}, …, "steps": {…}, "complete": …}}}}``
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    chosen = table.filter(pl.col("horizon").is_in(list(horizons)))
    rows = mean_sem(chosen, ("prediction", "control", "measure", "horizon"))
    for row in sorted(rows, key=lambda row: CONTROLS.index(row["control"])):
        by_horizon = found.setdefault(row["prediction"], {}).setdefault(row["measure"], {})
        entry = by_horizon.setdefault(str(row["horizon"]), {})
        numbers = {name: row[name] for name in VALUES}
        if row["control"] == "model":
            entry |= {**numbers, "steps": row["steps"], "complete": row["complete"]}
        else:
            entry[row["control"]] = numbers
    return found


def mean_sem(table: pl.DataFrame, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard error over the episodes of each group, in the order in which the groups come.

    Returns:
        The keys of each group; ``accumulated``, ``per_step`` and ``steps``, each ``{"mean": …, "sem": …}``, whose
        standard error is None of one episode; and how many episodes are ``complete``, that is, reach the horizon.
    """
    names = (*VALUES, "steps")
    grouped = table.group_by(*keys, maintain_order=True).agg(
        *(pl.col(name).mean().alias(f"{name}_mean") for name in names),
        *((pl.col(name).std() / pl.len().sqrt()).alias(f"{name}_sem") for name in names),
        complete=(pl.col("steps") == pl.col("horizon")).sum(),
    )
    return [
        {
            **{key: row[key] for key in keys},
            **{name: {"mean": row[f"{name}_mean"], "sem": row[f"{name}_sem"]} for name in names},
            "complete": row["complete"],
        }
        for row in grouped.iter_rows(named=True)
    ]


def groups(table: pl.DataFrame, horizons: Sequence[int], divergence: str) -> list[dict[str, Any]]:
    """Errors of the episodes of each split, and within the first of each distribution, variation and factor, open loop.

    A factor that varies is cut into up to three strata by its absolute value, of as equally many episodes as can be
    where those of one value stay together.
    """
    first = table["split"][0]
    cuts = [
        ("split", str(value), pl.col("split") == value)
        for value in table["split"].unique(maintain_order=True)
    ]
    within = table.filter(pl.col("split") == first)
    for name in ("distribution", "variation"):
        for value in within[name].unique(maintain_order=True):
            cuts.append((name, str(value), (pl.col("split") == first) & (pl.col(name) == value)))
    for name in (column for column in table.columns if column.startswith("factor_")):
        for label, chosen in _strata(within, name):
            cuts.append((name, label, (pl.col("split") == first) & chosen))
    found = []
    for by, value, condition in cuts:
        chosen_rows = table.filter(condition)
        errors = headline(entries(chosen_rows, horizons), divergence)
        found.append({"by": by, "value": value, "episodes": chosen_rows["episode"].n_unique(), **errors})
    return found


def headline(measures: Mapping[str, Any], divergence: str) -> dict[str, Any]:
    """The three errors that a run is known by, open loop; no error of the state where the store has none."""
    open_loop = measures["open_loop"]
    return {
        "dynamics_error": open_loop[f"dynamics_{divergence}"],
        "reward_error": open_loop["reward_error"],
        "state_error": open_loop.get("state_error"),
    }


def _strata(table: pl.DataFrame, factor: str) -> list[tuple[str, pl.Expr]]:
    """Conditions on a factor's absolute value, and what they are called; none where it does not vary.

    Episodes of one value stay together, by their mean rank: at edges between values, the many that have none of a
    factor would be one stratum with all that have some.
    """
    values = table.group_by("episode").agg(pl.col(factor).first().abs())[factor].drop_nulls().to_numpy()
    if len(np.unique(values)) < 2:
        return []
    thirds = np.ceil(STRATA * (rankdata(values) - 1) / (len(values) - 1)).clip(1)
    found = []
    for third in np.unique(thirds):
        within = values[thirds == third]
        low, high = float(within.min()), float(within.max())
        label = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        found.append((label, pl.col(factor).abs().is_between(low, high)))
    return found


def action_sensitivity(measures: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Errors along shuffled actions over errors along the true ones, by prediction, measure and horizon."""
    return {
        prediction: {
            name: {
                horizon: _ratio(entry["shuffled_actions"]["per_step"]["mean"], entry["per_step"]["mean"])
                for horizon, entry in by_horizon.items()
            }
            for name, by_horizon in measures[prediction].items()
            if name.endswith("_error") or name.startswith("dynamics_")
        }
        for prediction in PREDICTIONS
    }


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
