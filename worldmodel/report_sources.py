"""What a report is made of: the records of studies, and the tables that probes wrote into their runs' folders.

A number is in a report only if its run is finished, its store verifies and all of its predictions were finite;
everything else is listed as what it is, and averaged into nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pvrpipe.schemas.errors import NotAStudyError, PvrpipeError
from pvrpipe.schemas.study_record import JobRecord, StudyRecord, read_record
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.runs import read_run

ERRORS = ("reward_error", "state_error", "dynamics_error")
OWN = "own"  # the look that a run was trained on
#: What a run is; equal in all but ``seed``, runs are repeats of one another.
RUN_KEYS = ("environment", "variation", "pvr", "encoder", "blocks", "model", "size", "seed")
#: What an episode's numbers are grouped by.
ROW_KEYS = ("look", "prediction", "control", "measure", "horizon")


@dataclass(frozen=True)
class Evidence:
    """Everything that a report says something about."""

    studies: tuple[tuple[Path, StudyRecord], ...]
    runs: pl.DataFrame
    """a row per run: :data:`RUN_KEYS`, ``arm`` (what it is a repeat of), ``run`` (its folder), ``store``, ``state``,
    ``failure``, ``random_weights``"""
    scores: pl.DataFrame
    """a row per finished run × :data:`ROW_KEYS`: means over episodes, ``accumulated``, ``per_step``, ``steps``, the
    standard error ``sem`` of the first, and ``episodes``"""

    @property
    def finished(self) -> pl.DataFrame:
        """The runs that have numbers."""
        return self.runs.filter(state="finished")

    def errors(self, **wanted: Any) -> pl.DataFrame:
        """Open-loop errors of the models themselves."""
        return self.scores.filter(prediction="open_loop", control="model", **wanted)


def evidence_of(folders: Sequence[Path]) -> Evidence:
    """Read studies and the probes of all their runs.

    Raises:
        NotAStudyError: one of the folders holds none, or none of their runs has been probed.
    """
    studies = tuple((folder, read_record(folder)) for folder in folders)
    rows, tables = [], []
    seen: set[Path] = set()
    for folder, record in studies:
        root = Path(os.path.normpath((folder if folder.is_dir() else folder.parent) / record.root))
        random = {store.folder: store.random_weights for store in record.stores}
        for job in record.jobs:
            run = root / job.run
            if run in seen:  # studies share what they have in common
                continue
            seen.add(run)
            row = {name: getattr(job, name) for name in (*RUN_KEYS, "store", "state", "failure")}
            row |= {"run": str(run), "random_weights": random.get(job.store, False)}
            if job.state == "finished":
                found = _scores_of(run, job, record.study.probe.splits[0])
                if isinstance(found, pl.DataFrame):
                    tables.append(found.with_columns(pl.lit(str(run)).alias("run")))
                else:
                    row |= found
            rows.append(row)
    if not tables:
        raise NotAStudyError(
            f"no run of {', '.join(map(str, folders))} has been probed yet; go on with `pvrpipe study`"
        )
    return _evidence(studies, rows, tables)


def evidence_of_runs(folders: Sequence[Path]) -> Evidence:
    """The probes of single runs, as ``compare`` sets them side by side.

    Raises:
        RunError: one of the folders holds no run.
        NotAStudyError: one was not probed.
    """
    rows, tables = [], []
    for folder in folders:
        record = read_run(folder)
        path = folder / runs.PROBE_TABLE
        if not path.is_file():
            raise NotAStudyError(f"{folder} was not probed; first run `pvrpipe probe {folder}`")
        table = pl.read_parquet(path)
        config, about = record.config, table.row(0, named=True)
        row = {
            "environment": about["environment"],
            "variation": about["variation"],
            "pvr": record.pvr,
            "encoder": config["encoder"],
            "blocks": _blocks(record.encoder.blocks if record.encoder else None),
            "model": config["model"],
            "size": config["size"],
            "seed": config["seed"],
            "store": record.store,
            "state": record.state,
            "failure": "",
            "run": str(folder),
            "random_weights": record.random_weights,
        }
        rows.append(row)
        split = table["split"][0]
        tables.append(
            _means(table.lazy().filter(split=split), OWN).with_columns(pl.lit(str(folder)).alias("run"))
        )
    return _evidence((), rows, tables)


def _blocks(blocks: Iterable[int] | None) -> str:
    return "all" if blocks is None else ",".join(map(str, blocks))


def _evidence(studies: Any, rows: list[dict[str, Any]], tables: list[pl.DataFrame]) -> Evidence:
    known = pl.DataFrame(rows).with_columns(_arm())
    about = known.select("run", *RUN_KEYS, "arm", "random_weights")
    return Evidence(
        studies, known, pl.concat(tables, how="diagonal").join(about, on="run", maintain_order="left")
    )


def _arm() -> pl.Expr:
    """What a run is a repeat of: its representation, and its map where the model was given several."""
    through = pl.col("encoder")
    several = through.filter(through != "cnn").n_unique().over("model") > 1
    named = pl.format("{} ({})", "pvr", through)
    return pl.when(several & (through != "cnn")).then(named).otherwise(pl.col("pvr")).alias("arm")


def _scores_of(run: Path, job: JobRecord, split: str) -> pl.DataFrame | dict[str, str]:
    """Means over a run's held-out episodes in each look it was probed on, or why there are none."""
    tables = []
    try:
        if read_run(run).state != "finished":
            return {"state": "waiting", "failure": "it was begun again since"}
        for name in job.probes:
            label = name.removeprefix("probe").removesuffix(".parquet").removeprefix("-")
            tables.append(_means(pl.scan_parquet(run / name).filter(split=split), label or OWN))
    except (PvrpipeError, OSError, pl.exceptions.PolarsError) as error:
        return {"state": "failed", "failure": " ".join(str(error).split())[:300]}
    table = pl.concat(tables)
    if table["accumulated"].is_finite().all() and len(table):
        return table
    return {"state": "diverged", "failure": "a prediction is not finite"}


def _means(table: pl.LazyFrame, look: str) -> pl.DataFrame:
    """Means over episodes; ``dynamics_error`` is what the study plots of the model."""
    rows = table.with_columns(
        pl.lit(look).alias("look"), pl.col("horizon").cast(pl.Int64), pl.col("steps").cast(pl.Float64)
    )
    values = ("accumulated", "per_step", "steps")
    lists = rows.group_by(ROW_KEYS, maintain_order=True).agg(
        values
    )  # a sum over threads differs in its last bits
    found = lists.select(
        *ROW_KEYS,
        *(pl.col(name).list.mean() for name in values),
        sem=pl.col("accumulated").list.std() / pl.col("accumulated").list.len().sqrt(),
        episodes=pl.col("accumulated").list.len(),
    ).collect()
    divergence = "dynamics_kl_mean" if "dynamics_kl_mean" in found["measure"] else "dynamics_mse"
    plotted = found.filter(measure=divergence).with_columns(pl.lit("dynamics_error").alias("measure"))
    return pl.concat([found, plotted])
