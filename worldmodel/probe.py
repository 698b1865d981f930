"""How well a world model predicts held-out episodes (Schneider et al. 2024, section 4.4).

The model filters the first ``context`` rows of an episode and then predicts along the episode's actions without seeing
another observation (``open_loop``), or one row ahead of every row (``one_step``). What it says of each row is measured
in every way at once, and so are the controls:

* ``shuffled_actions``: the same model, the same chance, the same actions in another order of time.
* ``no_change``: the latent of the last row seen held still, and the mean reward of the training rows.
* ``mean``: the mean latent of the training rows.
* ``filtered``: the state as it is read off the latent once the row was seen; what no prediction can beat.

The measures are in :mod:`pvrpipe.worldmodel.probe_reward`, :mod:`pvrpipe.worldmodel.probe_state`, each model's
``divergences``, and with formulas, units and sources in ``docs/probes.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pvrpipe.schemas.errors import DivergedError, InvalidValueError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.files import write_whole
from pvrpipe.store.places import without_password
from pvrpipe.store.workspace import slug
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.judging import LESS
from pvrpipe.worldmodel.probe_dynamics import PREDICTIONS, Floats, Judged, judge
from pvrpipe.worldmodel.probe_reference import beliefs_of, networks_of, reference_of
from pvrpipe.worldmodel.probe_reward import calibration, precision_recall
from pvrpipe.worldmodel.probe_subject import Subject, subject_of
from pvrpipe.worldmodel.probe_table import (
    LONGEST,
    action_sensitivity,
    entries,
    groups,
    headline,
    horizons_of,
    table_of,
)
from pvrpipe.worldmodel.statistics import pearson, spearman


def probe(
    run: Path | str,
    store: Path | str | None = None,
    *,
    horizons: Sequence[int] = (33, 500),
    context: int = 1,
    split: str | Sequence[str] = "val",
    seed: int = 0,
    device: str | torch.device = "cpu",
    label: str = "",
    backbone: torch.nn.Module | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Probe a run and write ``metrics.json`` and ``probe.parquet`` into its folder.

    Args:
        run: the run's folder.
        store: embeddings of the same encoder, or rollouts where the run learned from frames; the run's own if None.
        horizons: rows to accumulate over.
        context: rows seen before predicting.
        split: which episodes; of several, the first is what the report is about and the others are groups.
        seed: decides the samples and the shuffled actions.
        device: where to compute.
        label: of the store, where it is not the run's own: ``probe-LABEL.parquet`` lies beside the run's own. A store
            of another environment needs one.
        backbone: on the device, what the run was trained through, if it was.
        progress: told episodes done and to do.

    Returns:
        The report. ``dynamics_error`` (in the model's own divergence) and ``reward_error``, open loop, are by horizon::

            {"33": {"accumulated": {"mean": …, "sem": …}, "per_step": {"mean": …, "sem": …},
                    "shuffled_actions": {"accumulated": {…}, "per_step": {…}}, "no_change": {…}, "mean": {…},
                    "steps": {"mean": …, "sem": …}, "complete": episodes that reach the horizon}}

        ``measures`` has the same of every prediction and measure, ``groups`` of some of the episodes. Means and
        standard errors are over episodes; the standard error of one episode is None.

    Raises:
        RunError: no run, or a store of another encoder, or without a label of another environment.
        DivergedError: predictions that are not finite.
        InvalidValueError: no episode of the split is longer than the context.
    """
    check_horizons(horizons, context)
    if label != slug(label):
        raise InvalidValueError(f"--label {label!r} is no part of a file's name; give {slug(label)!r}")
    folder, splits = Path(run), (split,) if isinstance(split, str) else tuple(split) or ("val",)
    with subject_of(folder, store, device, backbone, elsewhere=bool(label)) as subject:
        model, record, reader = subject.model, subject.record, subject.reader
        wanted = {name: subject.episodes(name, context) for name in splits}
        seen = beliefs_of(model, reader, subject.episodes("train"), seed)
        reference, networks = reference_of(model, reader, seen), networks_of(model, reader, seen, seed)
        width, known = seen.features.shape[1], horizons_of(horizons, subject.longest - context)
        tables, rewards = [], []
        for name, numbers in wanted.items():
            for chosen, episodes in reader.batches(numbers, width):
                judged = judge(model, episodes, context, reference, (seed, chosen[0]))
                check_finite(folder, judged, chosen)
                tables.append(table_of(judged, subject.store.episodes[chosen], known))
                rewards.append(judged.only("reward_predicted", "reward_received"))
                progress(numbers.index(chosen[-1]) + 1, len(numbers), f"{name} episodes")
    table, first = pl.concat(tables), next(iter(wanted))
    about = {**identity_of(subject, folder), "run_seed": record.config["seed"]}
    report = {
        **identity_of(subject, folder),
        "run_state": record.state,
        "store": without_password(subject.store.path),
        "split": first,
        "context": context,
        "seed": seed,
        "latent": list(reference.mean_latent.shape),
        **report_of(table.filter(pl.col("split") == first), horizons, model.divergence),
        "calibration": calibrations(rewards, len(wanted[first]), horizons),
        "reward_event": None if reference.event is None else asdict(reference.event),
        "state_reader": None if reference.state is None else {"penalty": reference.state.penalty},
        "networks": networks,
        "groups": groups(table, horizons, model.divergence),
    }
    table_name, report_name = (runs.labelled(name, label) for name in (runs.PROBE_TABLE, runs.PROBE))
    return write_findings(folder, table_name, report_name, labelled(table, about), report)


def identity_of(subject: Subject, folder: Path) -> dict[str, Any]:
    """What a report and its table are about."""
    return {
        "run": str(folder),
        "model": subject.record.config["model"],
        "size": subject.record.config["size"],
        "pvr": subject.record.pvr,
        "random_weights": subject.record.random_weights,
        "environment": subject.store.manifest.rollouts.environment,
        "store_id": subject.store.manifest.id,
    }


def report_of(table: pl.DataFrame, horizons: Sequence[int], divergence: str) -> dict[str, Any]:
    """What is said of the episodes of a table."""
    measures = entries(table, horizons)
    return {
        "episodes": table["episode"].n_unique(),
        "divergence": divergence,
        **headline(measures, divergence),
        "measures": measures,
        "action_sensitivity": action_sensitivity(measures),
        "returns": {str(h): returns_of(table, h) for h in horizons},
        "reward_events": {
            prediction: {str(h): events_of(table, prediction, h) for h in horizons}
            for prediction in PREDICTIONS
        },
    }


def returns_of(table: pl.DataFrame, horizon: int) -> dict[str, Any]:
    """Imagined beside true returns of episodes over a horizon, open loop, and their correlations."""
    imagined, true = (
        _of(table, "open_loop", name, horizon)["accumulated"].to_numpy()
        for name in ("reward_predicted", "reward_received")
    )
    return {
        "imagined": float(imagined.mean()),
        "true": float(true.mean()),
        "absolute_error": float(np.abs(imagined - true).mean()),
        "pearson": _plain(pearson(imagined, true)),
        "spearman": _plain(spearman(imagined, true)),
    }


def events_of(table: pl.DataFrame, prediction: str, horizon: int) -> dict[str, float | None] | None:
    """Precision and recall of reward events; None where rewards are not sparse."""
    names = ("events_predicted", "events_received", "events_hit")
    counts = [_of(table, prediction, name, horizon)["accumulated"] for name in names]
    return precision_recall(*(float(count.sum()) for count in counts)) if len(counts[0]) else None


def calibrations(
    rewards: Sequence[Judged], episodes: int, horizons: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Calibration of the rewards of all rows of the first so many episodes, by prediction and horizon."""
    counts = np.cumsum([len(part.steps) for part in rewards])
    chosen = rewards[: int(np.searchsorted(counts, episodes)) + 1]

    def rows(horizon: int, prediction: str, measure: str) -> Floats:
        return np.concatenate([part.within(horizon, (prediction, "model", measure)) for part in chosen])

    return {
        prediction: {
            str(h): calibration(
                rows(h, prediction, "reward_predicted"), rows(h, prediction, "reward_received")
            )
            for h in horizons
        }
        for prediction in PREDICTIONS
    }


def _of(table: pl.DataFrame, prediction: str, measure: str, horizon: int) -> pl.DataFrame:
    return table.filter(
        (pl.col("prediction") == prediction)
        & (pl.col("control") == "model")
        & (pl.col("measure") == measure)
        & (pl.col("horizon") == horizon)
    )


def _plain(estimate: Any) -> dict[str, Any]:
    """As JSON has it: no number that is none."""
    return {name: None if value != value else value for name, value in asdict(estimate).items()}


def check_horizons(horizons: Sequence[int], context: int) -> None:
    """Refuse horizons and contexts without a row, and horizons that no table holds."""
    if context < 1 or not horizons or min(horizons) < 1 or max(horizons) > LONGEST:
        raise InvalidValueError(
            f"--horizon is {list(horizons)} behind a context of {context}; all must be at least 1, "
            f"and a horizon at most {LONGEST}"
        )


def check_finite(folder: Path, judged: Judged, numbers: Sequence[int]) -> None:
    """Raise DivergedError, naming run and episode, unless all that was measured is a number."""
    for (prediction, control, measure), values in judged.values.items():
        exists = np.arange(values.shape[1]) < judged.steps[:, None]
        wrong = (exists & ~np.isfinite(values)).any(1)
        if wrong.any():
            raise DivergedError(
                f"{folder}: {measure} of {control}, {prediction}, is not finite in episode "
                f"{numbers[int(wrong.argmax())]}; the model has diverged: {LESS}"
            )


def labelled(table: pl.DataFrame, about: Mapping[str, Any]) -> pl.DataFrame:
    """The same of every row, in front."""
    return table.select(*(pl.lit(value).alias(name) for name, value in about.items()), pl.all())


def write_findings(
    folder: Path, table_name: str, report_name: str, table: pl.DataFrame, report: dict[str, Any]
) -> dict[str, Any]:
    """The table first: a report without it would be numbers from nowhere. The report, with the sha256 of its table."""
    data = BytesIO()
    table.write_parquet(data)
    write_whole(folder / table_name, data.getvalue())
    report = {**report, runs.TABLE_SHA256: hashlib.sha256(data.getvalue()).hexdigest()}
    write_whole(folder / report_name, (canonical_json(report) + "\n").encode())
    return report
