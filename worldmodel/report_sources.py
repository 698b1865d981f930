"""What a report is made of: the records of studies, and the tables that probes wrote into their runs' folders.

A number is in a report only if its run is finished, its store verifies and all of its predictions were finite;
everything else is listed as what it is, and averaged into nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from pvrpipe.schemas.errors import NotAStudyError, PvrpipeError
from pvrpipe.schemas.specifications import EncoderIdentity
from pvrpipe.schemas.study import Probing
from pvrpipe.schemas.study_record import RECORD, JobRecord, StudyRecord, read_record
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.runs import read_run

ERRORS = ("reward_error", "state_error", "dynamics_error")
CHANGED = "what its probe wrote; probe it again"
OWN = "own"  # the look that a run was trained on
#: What a run is; equal in all but ``seed``, runs are repeats of one another.
RUN_KEYS = ("environment", "variation", "pvr", "encoder", "blocks", "model", "size", "seed")
TASK = ("environment", "variation")
REPEATED = (*TASK, "arm", "model", "size")  # what repeats of one another have in common
STORE = "store_id"
#: Of a run's configuration, what is in :data:`RUN_KEYS` or changes no number.
UNTOLD = ("model", "size", "seed", "encoder", "save_every", "log_every")
UNMADE = ("waiting", "failed")  # states of a run that may be finished since
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

    def pictured(self, name: str) -> pl.DataFrame:
        """The runs that have a map, or a film strip, and whole; of repeats the first."""
        whole = [runs.is_sound(Path(run) / name) for run in self.finished["run"]]
        drawn = self.finished.filter(pl.Series(whole, dtype=pl.Boolean))
        return drawn.unique(REPEATED, keep="first", maintain_order=True)

    def unpictured(self, name: str) -> pl.DataFrame:
        """What has numbers and no map, or no film strip: a row for all repeats."""
        repeated = self.finished.unique(REPEATED, keep="first", maintain_order=True)
        return repeated.join(self.pictured(name), on=REPEATED, how="anti", maintain_order="left")

    def errors(self, **wanted: Any) -> pl.DataFrame:
        """Open-loop errors of the models themselves."""
        return self.scores.filter(prediction="open_loop", control="model", **wanted)


#: Columns of the means of a run, and of no run.
MEANS = {
    **dict.fromkeys(("look", "prediction", "control", "measure"), pl.String),
    "horizon": pl.Int64,
    **dict.fromkeys(("accumulated", "per_step", "steps", "sem"), pl.Float64),
    "episodes": pl.UInt32,
    "run": pl.String,
}


def evidence_of(folders: Sequence[Path]) -> Evidence:
    """Read studies and the probes of all their runs, of which none may have numbers.

    Raises:
        NotAStudyError: one of the folders holds none, or none of their runs was begun.
    """
    studies = tuple((folder, read_record(folder)) for folder in folders)
    parts = _told_apart([part for folder, record in studies for part in _of_study(folder, record)])
    if all(part.row["state"] == "waiting" for part in parts):
        raise NotAStudyError(
            f"no run of {', '.join(map(str, folders))} has numbers yet ({len(parts)} waiting); "
            "go on with `pvrpipe study`"
        )
    return _evidence(studies, parts)


def evidence_of_runs(folders: Sequence[Path]) -> Evidence:
    """The probes of single runs, and of all runs of studies, as ``compare`` sets them side by side.

    Raises:
        RunError: one of the folders holds neither a run nor a study.
        NotAStudyError: none was probed.
    """
    parts: list[Part] = []
    for folder in folders:
        study = folder.name == RECORD or (folder / RECORD).is_file()
        parts += _of_study(folder, read_record(folder)) if study else [_of_run(folder)]
    if all(part.scores is None for part in parts):
        told = next((f"{part.row['run']} {part.row['failure']}" for part in parts), "there is no run")
        raise NotAStudyError(f"no run has numbers to compare: {told}")
    return _evidence((), _told_apart(parts))


@dataclass(frozen=True)
class Part:
    """One run: what it is, and its numbers if it has any."""

    row: dict[str, Any]
    scores: pl.DataFrame | None
    trained: dict[str, Any] = field(default_factory=dict)
    """how, and how it was probed, besides :data:`RUN_KEYS`; ``store_id`` says on what"""
    of: str = ""
    """what to call it by where others were trained on other stores of the same task"""

    @property
    def place(self) -> Path:
        """Its folder, by the one name that it has."""
        return Path(self.row["run"]).resolve()


def _of_study(folder: Path, record: StudyRecord) -> Iterator[Part]:
    """All runs of a study."""
    root = Path(os.path.normpath((folder if folder.is_dir() else folder.parent) / record.root))
    random = {store.folder: store.random_weights for store in record.stores}
    ids = {store.folder: store.id for store in record.stores if store.id}
    for job in record.jobs:
        row = {name: getattr(job, name) for name in (*RUN_KEYS, "store", "state", "failure")}
        run, asked = root / job.run, record.study.probe
        row |= {"run": str(run), "random_weights": random.get(job.store, False)}
        if job.state == "finished":
            trained = {**_trained(run), "split": asked.splits[0], "context": asked.context}
            found = _scores_of(run, job, asked, ids)
            yield replace(_part(row, found, trained), of=f"of {folder}")
        else:
            yield _part(row, {})


def _trained(run: Path) -> dict[str, Any]:
    """How a run was trained, and on which store; nothing of one that cannot be read."""
    try:
        record = read_run(run)
    except PvrpipeError:
        return {}
    trained = {name: value for name, value in record.config.items() if name not in UNTOLD}
    if record.encoder:
        readout = {name: getattr(record.encoder, name) for name in ("layer", "pooling", "blocks")}
        trained |= {**readout, "weights": _weights(record.encoder, tuned=record.tuning is not None)}
    if record.encoder and record.tuning:
        trained["final_norm"] = record.encoder.final_norm
    return trained | {STORE: record.store_id}


def _weights(encoder: EncoderIdentity, *, tuned: bool) -> str:
    """Weights by name. Of embeddings the store tells one file from another; not of frames, which models look at."""
    if (seed := encoder.weights.random_seed) is not None:
        return f"random:{seed}"
    return encoder.weights.tensors_sha256[:8] if tuned else "its own"


def _of_run(folder: Path) -> Part:
    """A run on its own, as it was probed last."""
    record, path = read_run(folder), folder / runs.PROBE_TABLE
    trained = _trained(folder)
    row = {
        "environment": "",
        "variation": "",
        "pvr": record.pvr,
        "encoder": record.config["encoder"] if record.encoder else "cnn",
        "blocks": _blocks(record.encoder.blocks if record.encoder else None),
        "model": record.config["model"],
        "size": record.config["size"],
        "seed": record.config["seed"],
        "store": record.store,
        "state": record.state,
        "failure": "",
        "run": str(folder),
        "random_weights": record.random_weights,
    }
    trained |= _probed_as(folder)
    if not path.is_file():
        lacking = {"state": "waiting", "failure": f"was not probed; first run `pvrpipe probe {folder}`"}
        return _part(row, lacking, trained)
    if record.state != "finished":
        told = "is not trained to its end; go on with `pvrpipe train-model`, then probe it"
        return _part(row, {"state": "waiting", "failure": told}, trained)
    if not runs.has_its_table(folder):
        return _part(row, {"state": "damaged", "failure": f"{path.name} is not {CHANGED}"}, trained)
    try:
        table = pl.read_parquet(path)
        about = table.row(0, named=True)
        row |= {name: about[name] for name in ("environment", "variation")}
        return _part(row, _whole([_means(table.lazy().filter(split=about["split"]), OWN)]), trained)
    except pl.exceptions.PolarsError as error:
        return _part(row, _unread(error), trained)


def _probed_as(folder: Path) -> dict[str, Any]:
    """How a run was probed, as far as errors of another probe are errors of something else."""
    try:
        found = json.loads((folder / runs.PROBE).read_bytes())
        return {name: found[name] for name in ("split", "context")}
    except (OSError, ValueError, KeyError):
        return {}


def _part(
    row: dict[str, Any], found: pl.DataFrame | dict[str, str], trained: dict[str, Any] | None = None
) -> Part:
    if isinstance(found, pl.DataFrame):
        return Part(row, found, trained or {})
    return Part({**row, **found}, None, trained or {})


def _told_apart(parts: Sequence[Part]) -> list[Part]:
    """Runs of one name that were not trained alike are no repeats: their names say in what they differ.

    Stores of different tasks always differ; where those of one task do, runs are told apart by where they are from.
    """
    names = ("pvr", "model", "size")
    alike: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        alike.setdefault(tuple(part.row[name] for name in names), []).append(part)

    def named(part: Part, others: Sequence[Part]) -> Part:
        differs = [
            name
            for name in part.trained
            if name != STORE
            and len({repr(other.trained[name]) for other in others if name in other.trained}) > 1
        ]
        told = "".join(f", {name.replace('_', ' ')} {part.trained[name]}" for name in differs)
        if STORE in part.trained and _of_several_stores(others):
            told += ", " + (part.of or f"store {part.trained[STORE][:8]}")
        return replace(part, row={**part.row, "told": told})

    return [named(part, alike[tuple(part.row[name] for name in names)]) for part in parts]


def _of_several_stores(parts: Sequence[Part]) -> bool:
    """Whether some runs of one task were trained on different stores."""
    known = {(*(p.row[name] for name in TASK), p.trained[STORE]) for p in parts if STORE in p.trained}
    return len(known) > len({task[:-1] for task in known})


def _blocks(blocks: Iterable[int] | None) -> str:
    return "all" if blocks is None else ",".join(map(str, blocks))


def _evidence(studies: Any, parts: Sequence[Part]) -> Evidence:
    """All runs, each once however often it was named: what one study has not made, another may have."""
    kept: dict[Path, Part] = {}
    for part in parts:
        if kept.setdefault(part.place, part).row["state"] in UNMADE and part.scores is not None:
            kept[part.place] = part
    told_once = list(_once(kept.values()))
    scores = [
        part.scores.with_columns(pl.lit(part.row["run"]).alias("run"))
        for part in told_once
        if part.scores is not None
    ]
    known = pl.DataFrame([part.row for part in told_once]).with_columns(_arm()).drop("told")
    about = known.select("run", *RUN_KEYS, "arm", "random_weights")
    return Evidence(
        studies,
        known,
        pl.concat([pl.DataFrame(schema=MEANS), *scores], how="diagonal_relaxed").join(
            about, on="run", maintain_order="left"
        ),
    )


def _once(parts: Iterable[Part]) -> Iterator[Part]:
    """Without numbers, what is the training of a run before it: a copy of a run is no second seed."""
    trainings: dict[str, Part] = {}
    for part in parts:
        if part.scores is None or STORE not in part.trained:
            yield part
            continue
        about = [part.row[name] for name in RUN_KEYS], sorted(part.trained.items())
        first = trainings.setdefault(repr(about), part)
        why = f"the same training as {first.row['run']}, which would count twice"
        copied = replace(part, scores=None, row={**part.row, "state": "repeated", "failure": why})
        yield part if first is part else copied


def _arm() -> pl.Expr:
    """What a run is a repeat of: its representation, and its map where the model was given several."""
    through = pl.col("encoder")
    several = through.filter(through != "cnn").n_unique().over("model") > 1
    named = pl.format("{} ({}){}", "pvr", through, "told")
    return (
        pl.when(several & (through != "cnn"))
        .then(named)
        .otherwise(pl.col("pvr") + pl.col("told"))
        .alias("arm")
    )


def _scores_of(
    run: Path, job: JobRecord, asked: Probing, ids: Mapping[str, str]
) -> pl.DataFrame | dict[str, str]:
    """Means over a run's held-out episodes in each look it was probed on, or why there are none."""
    tables = []
    try:
        if read_run(run).state != "finished":
            return {"state": "waiting", "failure": "it was begun again since"}
        for name in job.probes:
            label = name.removeprefix("probe").removesuffix(".parquet").removeprefix("-")
            stores = {store for folder, store in ids.items() if label or folder == job.store}
            if not _as_asked(run / runs.labelled(runs.PROBE, label), job, asked, stores):
                told = "it was probed otherwise since; `pvrpipe study` probes it again as the study asks"
                return {"state": "waiting", "failure": told}
            if (run / name).is_file() and not runs.has_its_table(run, label):
                return {"state": "damaged", "failure": f"{name} is not {CHANGED}"}
            tables.append(_means(pl.scan_parquet(run / name).filter(split=asked.splits[0]), label or OWN))
    except (PvrpipeError, OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        return _unread(error)
    return _whole(tables)


def _as_asked(report: Path, job: JobRecord, asked: Probing, ids: Collection[str]) -> bool:
    """Whether a probe is that of its study, of one of these stores, and not one that somebody made by hand since."""
    if not report.is_file():
        return True
    try:
        found = runs.asked_of(json.loads(report.read_bytes()))
    except (ValueError, KeyError, TypeError):
        return False  # damaged, or another version's
    wanted = {
        "horizons": set(asked.horizons),
        "splits": set(asked.splits),
        "split": asked.splits[0],
        "context": asked.context,
        "seed": job.seed,
        "run_state": "finished",
    }
    store = found.pop("store_id")
    return found == wanted and (not ids or store in ids)


def _unread(error: Exception) -> dict[str, str]:
    return {"state": "failed", "failure": " ".join(str(error).split())[:300]}


def _whole(looks: Sequence[pl.DataFrame]) -> pl.DataFrame | dict[str, str]:
    """Means in every look, if there are some in each and all of them are numbers."""
    if any(table.is_empty() for table in looks):
        return {"state": "damaged", "failure": "a probe of it has no rows; probe it again"}
    table = pl.concat(looks)
    if table["accumulated"].is_finite().all():
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
