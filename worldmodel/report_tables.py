"""The tables of a report, each also a CSV and a Parquet file: every number of the page is in one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from pvrpipe.schemas.errors import InvalidValueError, one_line
from pvrpipe.schemas.study import AUTOENCODER
from pvrpipe.schemas.study_record import StoreRecord
from pvrpipe.store.files import make_folder, write_whole
from pvrpipe.worldmodel.report_findings import Comparison, Findings, Standing, relative_errors
from pvrpipe.worldmodel.report_sources import ERRORS, OWN, Evidence
from pvrpipe.worldmodel.statistics import aggregate, interquartile_mean, pearson, spearman

CORRELATED = ("environment", "model", "size", "measure", "horizon")  # within which errors go with returns
COLUMNS = "give a CSV with the columns pvr, model, return and perhaps environment"
OF_RUNS = ("environment", "variation", "arm", "model", "size")
PROPERTIES = ("vit", "diverse", "sequential", "language")  # of published representations
DIGITS = 6  # of a number that is read, not computed with
#: Columns of the table of properties.
OF_PROPERTIES = (
    "property",
    "look",
    "model",
    "size",
    "error",
    "horizon",
    "has",
    "pvrs",
    "relative",
    "low",
    "high",
    "runs",
)
PLAIN = "none"  # a look that varies nothing
SINGLE = r"^([a-z_]+)[=-]([0-9.]+)$"  # a look that varies one factor, as a file's name has it too


def tables_of(evidence: Evidence, findings: Findings) -> dict[str, pl.DataFrame]:
    """By name: runs, errors, scores, standings, comparisons, properties, costs and unfinished."""
    return {
        "runs": evidence.runs,
        "errors": errors_of(evidence),
        "scores": scores_of(evidence, findings),
        "standings": _flat(Standing, findings.standings, "relative"),
        "comparisons": _flat(Comparison, findings.comparisons, "improvement"),
        "properties": properties_of(evidence, sorted({s.horizon for s in findings.standings})),
        "costs": costs_of(evidence),
        "unfinished": unfinished_of(evidence),
    }


def scores_of(evidence: Evidence, findings: Findings) -> pl.DataFrame:
    """Each run's open-loop errors and its controls', at the horizons that are compared."""
    horizons = {standing.horizon for standing in findings.standings}
    kept = [*OF_RUNS, "seed", "look", "control", "measure", "horizon"]
    values = ("accumulated", "sem", "per_step", "steps", "episodes")
    return evidence.scores.filter(
        pl.col("measure").is_in(ERRORS),
        pl.col("control").is_in(("model", "no_change", "mean")),
        pl.col("horizon").is_in(sorted(horizons)),
        prediction="open_loop",
    ).select(*kept, *values)


def errors_of(evidence: Evidence) -> pl.DataFrame:
    """Open-loop errors, a row per task, arm, look, error and horizon: means over runs of means over episodes.

    ``sem`` is the standard error over runs (of one run: over its episodes), ``iqm`` the interquartile mean over runs,
    ``values`` the runs' own, by seed, and ``episodes`` those that each run was probed on.
    """
    rows = evidence.errors().filter(pl.col("measure").is_in(ERRORS))
    keys = [*OF_RUNS, "look", "measure", "horizon"]
    found = rows.group_by(keys, maintain_order=True).agg(
        runs=pl.len(),
        mean=pl.col("accumulated").mean(),
        sem=pl.when(pl.len() > 1)
        .then(pl.col("accumulated").std() / pl.len().sqrt())
        .otherwise(pl.col("sem").first()),
        per_step=pl.col("per_step").mean(),
        steps=pl.col("steps").mean(),
        episodes=pl.col("episodes").max(),
        pvr=pl.col("pvr").first(),
        encoder=pl.col("encoder").first(),
        blocks=pl.col("blocks").first(),
        random_weights=pl.col("random_weights").any(),
        values=pl.col("accumulated").sort_by("seed"),
    )
    middle = pl.Series("iqm", [float(interquartile_mean(v)) for v in found["values"].to_list()], pl.Float64)
    return found.with_columns(middle)


def ends_of(errors: pl.DataFrame, horizons: Sequence[int]) -> dict[int, float]:
    """Horizons that episodes do not reach, and the rows that errors are summed over there, on average."""
    means = {h: errors.filter(horizon=h)["steps"].mean() for h in horizons}
    return {h: float(steps) for h, steps in means.items() if isinstance(steps, float) and steps < h}


def severities_of(errors: pl.DataFrame) -> pl.DataFrame:
    """Errors in looks that vary one factor by a severity; of each factor that a shift varies, ``none`` is severity 0.

    What runs were trained on is such a look too, unless it varies several factors or draws them.
    """
    seen = pl.when(look=OWN).then("variation").otherwise("look")
    graded = errors.with_columns(
        seen=seen,
        factor=seen.str.extract(SINGLE, 1),
        severity=seen.str.extract(SINGLE, 2).cast(pl.Float64),
    )
    factors = graded.filter(pl.col("look") != OWN).select("factor").drop_nulls().unique(maintain_order=True)
    plain = (
        graded.filter(seen=PLAIN)
        .drop("factor")
        .join(factors, how="cross", maintain_order="left")
        .with_columns(severity=pl.lit(0.0))
    )
    varied = graded.join(factors, on="factor", how="semi", maintain_order="left")
    return pl.concat([plain, varied.select(plain.columns)]).sort("severity", maintain_order=True)


def costs_of(evidence: Evidence) -> pl.DataFrame:
    """What each representation took: seconds for 1,000 frames on one worker, memory meanwhile, bytes for each.

    A store that several studies have, or a copy of it, is one row: two would weigh double in means over tasks.
    """
    stores: dict[tuple[str | None, ...], StoreRecord] = {}
    for store in (store for _, record in evidence.studies for store in record.stores):
        place = store.environment, store.variation, store.pvr, store.id
        if (
            store.kind == "embeddings"
            and store.rows
            and not (place in stores and stores[place].frames_per_second)
        ):
            stores[place] = store
    rows: list[dict[str, Any]] = [
        {
            "environment": store.environment,
            "variation": store.variation,
            "pvr": store.pvr,
            "rows": store.rows,
            "bytes": store.bytes,
            "bytes_per_frame": store.bytes / store.rows,
            "seconds_per_1000_frames": 1000 / store.frames_per_second if store.frames_per_second else None,
            "memory_bytes": store.memory_bytes,
            "random_weights": store.random_weights,
        }
        for store in stores.values()
    ]
    return pl.DataFrame(rows, schema=COSTS)


COSTS = {
    "environment": pl.String,
    "variation": pl.String,
    "pvr": pl.String,
    "rows": pl.Int64,
    "bytes": pl.Int64,
    "bytes_per_frame": pl.Float64,
    "seconds_per_1000_frames": pl.Float64,
    "memory_bytes": pl.Int64,
    "random_weights": pl.Boolean,
}


UNFINISHED = {"what": pl.String, "state": pl.String, "why": pl.String}


def unfinished_of(evidence: Evidence) -> pl.DataFrame:
    """Runs and stores without numbers, and why."""
    stores = [
        {"what": store.folder, "state": store.state, "why": store.failure}
        for _, record in evidence.studies
        for store in record.stores
        if store.state != "finished"
    ]
    runs = [
        {"what": row["run"], "state": row["state"], "why": row["failure"]}
        for row in evidence.runs.filter(pl.col("state") != "finished").iter_rows(named=True)
    ]
    return pl.DataFrame([*stores, *runs], schema=UNFINISHED)


def unprobed_of(evidence: Evidence, horizons: Sequence[int]) -> pl.DataFrame:
    """Runs that have numbers, but not at all of these horizons, as :func:`unfinished_of` has those without any."""
    probed = evidence.errors().select("run", "horizon").unique()
    rows = []
    for run in evidence.finished["run"]:
        at = probed.filter(run=run)["horizon"].to_list()
        if lacking := [str(horizon) for horizon in horizons if horizon not in at]:
            why = f"was not probed over {' and '.join(lacking)} rows; probe it again with all horizons"
            rows.append({"what": run, "state": "finished", "why": why})
    return pl.DataFrame(rows, schema=UNFINISHED)


def returns_of(path: Path, errors: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Errors on the look that was trained on beside what agents got elsewhere, a row for each mean return.

    Errors are means over all that a return is of: maps and looks, and tasks too where the file names none. What was not
    done on all of these is left out; a return that is left without any error has a row of nulls.

    Args:
        path: a CSV with ``pvr``, ``model``, ``return`` and perhaps ``environment``.
        errors: of :func:`errors_of`.
        runs: all that were to be compared, also those that have no errors.

    Raises:
        InvalidValueError: the file cannot be read, lacks a column or a number, or names what was not to be compared.
    """
    how = f"--returns {path}: "
    try:
        given = pl.read_csv(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InvalidValueError(f"{how}it cannot be read ({one_line(error)}); {COLUMNS}") from None
    if missing := [name for name in ("pvr", "model", "return") if name not in given.columns]:
        raise InvalidValueError(f"{how}it has no column {', '.join(missing)}; {COLUMNS}")
    given = given.filter(~pl.all_horizontal(pl.all().is_null()))  # a blank line at its end
    if not len(given):
        raise InvalidValueError(f"{how}it has no rows; {COLUMNS}")
    given = given.with_columns(pl.col("return").cast(pl.Float64, strict=False))
    if not given["return"].is_finite().fill_null(False).all():
        raise InvalidValueError(f"{how}a return is not a number; {COLUMNS}")
    on = [name for name in ("environment", "pvr", "model") if name in given.columns]
    for name in on:
        known = runs[name].unique(maintain_order=True).to_list()
        if unknown := [value for value in given[name] if value not in known]:
            raise InvalidValueError(
                f"{how}{name} {unknown[0]!r} was not compared; there is {', '.join(known)}"
            )
    means = given.group_by(on, maintain_order=True).agg(pl.col("return").mean())
    keys = [*on, "size", "measure", "horizon"]
    matched = errors.filter(look=OWN).join(means, on=on, how="inner", maintain_order="left")
    if matched.is_empty():
        first = ", ".join(means.select(on).row(0))
        raise InvalidValueError(
            f"{how}none of its returns is of runs that have errors ({first} has none); {COLUMNS}"
        )
    found = matched.group_by(keys, maintain_order=True).agg(
        pl.col("mean").mean(),
        pl.col("return").first(),
        runs=pl.col("runs").sum(),
        tasks=pl.struct("environment", "variation").n_unique(),
    )
    alike = [key for key in keys if key != "pvr"]
    whole = found.filter(pl.col("tasks") == pl.col("tasks").max().over(alike))
    return pl.concat([whole, means.join(whole, on=on, how="anti")], how="diagonal")


def silent_returns(returns: pl.DataFrame) -> list[str]:
    """A sentence about the returns that stand beside no error, if there are any."""
    on = [name for name in ("environment", "pvr", "model") if name in returns.columns]
    of = ["/".join(row) for row in returns.filter(pl.col("mean").is_null()).select(on).rows()]
    told = "has no error of its own to stand beside: runs have no numbers, or not on as many tasks as others"
    return [f"A return that was given for {', '.join(of)} {told}."] if of else []


def properties_of(evidence: Evidence, horizons: Sequence[int]) -> pl.DataFrame:
    """Representations that have a property beside those that have not, in each look that runs were probed on.

    ``relative`` is the interquartile mean over runs and tasks of the error over that of the trivial prediction, with
    the 95 % interval of a bootstrap stratified over tasks. Learning from scratch, autoencoders and random weights have
    no part in it, and a property that no representation has is left out.
    """
    stores = [
        store for _, record in evidence.studies for store in record.stores if store.kind == "embeddings"
    ]
    published = {s.pvr: s for s in stores if s.pvr not in (None, AUTOENCODER) and not s.random_weights}
    known = [name for name in PROPERTIES if any(getattr(store, name) for store in published.values())]
    looks = evidence.scores["look"].unique(maintain_order=True).to_list()
    rows = []
    for look in looks:
        scores = relative_errors(evidence, look).filter(
            pl.col("horizon").is_in(list(horizons)), pl.col("pvr").is_in(list(published))
        )
        for name in known:
            has = {pvr: bool(getattr(store, name)) for pvr, store in published.items()}
            marked = scores.with_columns(has=pl.col("pvr").replace_strict(has, return_dtype=pl.Boolean))
            for about, part in marked.group_by(
                "model", "size", "measure", "horizon", "has", maintain_order=True
            ):
                tasks = part.partition_by("environment", "variation", maintain_order=True)
                found = aggregate([task["relative"].to_numpy() for task in tasks])
                keys = dict(zip(("model", "size", "error", "horizon", "has"), about, strict=True))
                numbers = {"relative": found.value, "low": found.low, "high": found.high, "runs": found.count}
                rows.append(
                    {"property": name, "look": look, **keys, "pvrs": part["pvr"].n_unique(), **numbers}
                )
    return _table(rows, OF_PROPERTIES)


def correlations_of(returns: pl.DataFrame, horizons: Sequence[int]) -> pl.DataFrame:
    """Linear and rank correlation of errors with returns over representations, of each task where returns name it."""
    rows = []
    keys = [key for key in CORRELATED if key in returns.columns]
    at = returns.filter(pl.col("horizon").is_in(list(horizons)))
    for about, part in at.group_by(keys, maintain_order=True):
        found = {
            "pearson": pearson(part["mean"], part["return"]),
            "spearman": spearman(part["mean"], part["return"]),
        }
        numbers = {
            name if which == "value" else f"{name}_{which}": getattr(estimate, which)
            for name, estimate in found.items()
            for which in ("value", "low", "high", "p")
        }
        rows.append({**dict(zip(keys, about, strict=True)), "points": len(part), **numbers})
    return pl.DataFrame(rows, infer_schema_length=None)


def write_tables(tables: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Each as ``NAME.csv`` and ``NAME.parquet``."""
    make_folder(folder)
    for name, table in tables.items():
        parquet = BytesIO()
        table.write_parquet(parquet)
        write_whole(folder / f"{name}.parquet", parquet.getvalue())
        write_whole(folder / f"{name}.csv", table.with_columns(*map(_legible, table)).write_csv().encode())


def _legible(column: pl.Series) -> pl.Series:
    """As a CSV has it: six digits, lists joined by blanks; Parquet has them all."""
    if isinstance(column.dtype, pl.List):
        return column.list.eval(pl.element().round_sig_figs(DIGITS).cast(pl.String)).list.join(" ")
    return column.round_sig_figs(DIGITS) if column.dtype.is_float() else column


def short(environment: str) -> str:
    """An environment as a chart's title has it."""
    return re.sub(r"^dmc:", "", environment)


def _flat(kind: type[Standing | Comparison], rows: Sequence[Any], estimate: str) -> pl.DataFrame:
    """Dataclasses as rows; an estimate's parts beside it."""
    flat = []
    for row in map(asdict, rows):
        parts = row.pop(estimate)
        flat.append({**row, estimate: parts["value"], "low": parts["low"], "high": parts["high"]})
    return _table(flat, [*(f.name for f in fields(kind) if f.name != estimate), estimate, "low", "high"])


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pl.DataFrame:
    """Rows, or none of them under their names: a file without a column is one that readers of CSV refuse."""
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame(schema=list(columns))
