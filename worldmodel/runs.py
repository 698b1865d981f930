"""A run's folder: what is trained on what (``run.json``), and the numbers along the way.

::

    data/runs/NAME/
    ├── run.json                 configuration, store, encoder, versions, state, result
    ├── checkpoint.safetensors   parameters and optimizer state
    ├── best.safetensors         the best so far, while a run with `--patience` trains; in the end the checkpoint
    ├── metrics.jsonl            training and validation losses by update
    ├── metrics.json             what `pvrpipe probe` found
    ├── probe.parquet            the same, episode by episode
    ├── metrics-….json, probe-….parquet   the same of other looks, in a study
    ├── map.parquet, strip.parquet        its latents in the plane and a film strip, in a study
    ├── pairs-….json, .parquet   what it found on a replay of the store
    └── tensorboard/
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy
import pyarrow
import torch
from pyarrow import parquet
from pydantic import Field, ValidationError, field_validator

import pvrpipe
from pvrpipe.schemas.errors import DivergedError, OutputExistsError, RunError, one_line
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.specifications import EncoderIdentity, Frozen, Tuning
from pvrpipe.store.files import (
    TEMPORARY,
    locked,
    make_folder,
    remove_temporaries,
    sha256_of,
    write_whole,
)
from pvrpipe.store.layout import refuse_inside_store
from pvrpipe.store.places import without_password
from pvrpipe.store.workspace import RUN, latest_first
from pvrpipe.worldmodel.checkpoints import BEST, CHECKPOINT
from pvrpipe.worldmodel.metrics_log import METRICS, TENSORBOARD, newest, updates_done
from pvrpipe.worldmodel.models import Setting

RECORD = RUN
PROBE, PROBE_TABLE, PAIRS = "metrics.json", "probe.parquet", "pairs-"
MAGIC = b"PAR1"  # at the end of a Parquet file
TABLE_SHA256 = "table_sha256"  # in a probe's report, of its table
MAP, STRIP = "map.parquet", "strip.parquet"
#: What was found of a run once it was trained; it goes when the run goes.
FOUND = ("metrics*.json", "probe*.parquet", f"{PAIRS}*", MAP, STRIP)


class RunFile(Frozen):
    """What a finished run's file must be."""

    size: int
    sha256: str


class RunRecord(Frozen):
    """``run.json``."""

    format: Literal["pvrpipe run"] = "pvrpipe run"
    format_version: Literal[1] = 1
    state: Literal["training", "finished", "diverged", "failed"]
    failure: str = ""
    """why a training that diverged or failed ended; the same command goes on with it"""
    config: dict[str, Any]
    store: str
    store_id: str
    environment: str = ""  # of a run that was begun before this was noted: unknown
    encoder: EncoderIdentity | None  # None: learned from frames
    tuning: Tuning | None = None  # of an encoder that is a part of the model
    setting: Setting
    parameters: int
    device: str
    processes: int = 1
    versions: dict[str, str]
    result: dict[str, Any] | None = None
    files: dict[Literal["checkpoint.safetensors", "metrics.jsonl"], RunFile] = Field(default_factory=dict)
    """of a finished run"""

    @field_validator("config")
    @classmethod
    def _says_what_is_trained(cls, config: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in ("model", "size", "updates") if name not in config]:
            raise ValueError(f"no {missing[0]}")
        return config

    @property
    def pvr(self) -> str:
        """The representation by name, and how much of it learned with the model."""
        if self.encoder is None:
            return "from scratch" if self.setting.frames is None else "a module of one's own"
        if self.tuning is None:
            return self.encoder.name
        learned = {"0": "frozen inside", "all": "all unfrozen"}
        return f"{self.encoder.name}, {learned.get(self.tuning.unfreeze, f'last {self.tuning.unfreeze} unfrozen')}"

    @property
    def random_weights(self) -> bool:
        """Whether nobody trained the representation."""
        return self.encoder is not None and self.encoder.weights.random_seed is not None


def labelled(name: str, label: str) -> str:
    """``probe.parquet`` of another look than the run's own: ``probe-LABEL.parquet``."""
    stem, _, suffix = name.partition(".")
    return f"{stem}-{label}.{suffix}" if label else name


def has_its_table(run: Path, label: str = "") -> bool:
    """Whether a probe's table is the one that its report is of; where that does not say, any whole Parquet file."""
    report, table = (run / labelled(name, label) for name in (PROBE, PROBE_TABLE))
    try:
        known = json.loads(report.read_bytes()).get(TABLE_SHA256) if report.is_file() else None
    except (ValueError, AttributeError):
        return False
    return is_whole(table) and known in (None, sha256_of(table))


def asked_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a probe was asked, as its report has it; numbers of another question are no answer to this one.

    Raises:
        KeyError: the report is another version's.
    """
    return {
        **{name: found[name] for name in ("store_id", "split", "context", "seed", "run_state")},
        "horizons": set(map(int, found["dynamics_error"])),
        "splits": {group["value"] for group in found["groups"] if group["by"] == "split"},
    }


def is_whole(table: Path) -> bool:
    """Whether a Parquet file is there that ends as one does."""
    if not table.is_file():
        return False
    with table.open("rb") as file:
        file.seek(max(0, table.stat().st_size - len(MAGIC)))
        return file.read() == MAGIC


def is_sound(table: Path) -> bool:
    """Whether a Parquet file is there whose pages are those that were written, by their checksums."""
    try:
        with parquet.ParquetFile(table, page_checksum_verification=True) as file:  # read_table imports pandas
            file.read()
    except (OSError, pyarrow.ArrowException):
        return False
    return True


def versions() -> dict[str, str]:
    """What decides the last bits of a run besides its configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pvrpipe": pvrpipe.__version__,
    }


def read_run(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        return RunRecord.model_validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} holds no run; first run `pvrpipe train-model`") from None
    except OSError as error:
        problem = f"cannot be read ({error}): mend that"
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        problem = f"cannot be read ({where or 'as a whole'}: {wrong['msg']}): fetch it again"
        if where == "format_version":
            problem = f"is of format {wrong['input']}, which another pvrpipe wrote: take that"
    raise RunError(f"{folder / RECORD} {problem}, or train again with --overwrite")


def finish(folder: Path, record: RunRecord, result: dict[str, Any]) -> None:
    """Write what became of a run, and which files it left."""
    files = {
        name: RunFile(size=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in (CHECKPOINT, METRICS)
    }
    ended = {"state": "finished", "result": result, "files": files}
    write_run(folder, record.model_copy(update=ended))


def check_checkpoint(folder: Path, record: RunRecord) -> None:
    """Refuse a finished run's checkpoint that is not the one that training wrote: a flipped bit loads as any other.

    Raises:
        RunError: its sha256 is another.
    """
    path, wanted = folder / CHECKPOINT, next((f for n, f in record.files.items() if n == CHECKPOINT), None)
    if wanted and path.is_file() and sha256_of(path) != wanted.sha256:
        raise RunError(
            f"{path} is not the one that training wrote; fetch the run again, or train it again with --overwrite"
        )


def write_run(folder: Path, record: RunRecord) -> None:
    """Replace ``run.json``."""
    write_whole(folder / RECORD, (canonical_json(record.model_dump(mode="json")) + "\n").encode())


@contextlib.contextmanager
def begun(folder: Path, draft: RunRecord, *, overwrite: bool) -> Iterator[RunRecord]:
    """Begin a run or go on with it, and hold its folder against other writers meanwhile.

    Raises:
        OutputExistsError: the folder holds a run of another configuration or store, or strangers' files, or lies in a
            store.
        StoreBusyError: another process is training there.
    """
    refuse_inside_store(folder)
    make_folder(folder)
    with locked(folder):
        if not (folder / RECORD).exists():
            if strangers := sorted(p.name for p in folder.iterdir() if TEMPORARY not in p.name):
                raise OutputExistsError(
                    f"{folder} is not empty and holds no run ({', '.join(strangers[:3])}); choose another output"
                )
        elif overwrite:
            _clear(folder)
        record = same_run(folder, draft).model_copy(update={"state": "training", "failure": ""})
        if (folder / RECORD).exists() and record.config != read_run(folder).config:
            _remove(folder, FOUND)  # of weights that are about to learn more
        write_run(folder, record)
        remove_temporaries(folder)
        try:
            yield record
        except Exception as error:
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            ended = {"state": state, "failure": without_password(one_line(error))}
            write_run(folder, record.model_copy(update=ended))
            raise


def same_run(folder: Path, draft: RunRecord) -> RunRecord:
    """The record of a run begun as drafted, or the draft where none was begun.

    A run that was asked for fewer updates and nothing else is the same and not finished, unless its patience decided
    which weights it kept.

    Raises:
        OutputExistsError: it was begun with another configuration; says which fields differ.
    """
    if not (folder / RECORD).exists():
        return draft
    existing = read_run(folder)
    had, wanted = (record.config["updates"] for record in (existing, draft))
    if isinstance(had, int) and had < wanted and not draft.config["patience"]:
        more = {"config": {**existing.config, "updates": wanted}}
        existing = existing.model_copy(update={**more, "state": "training", "result": None, "files": {}})
    old, new = (
        {
            **record.config,
            "store_id": record.store_id,
            "representation": record.pvr,
            "weights": record.encoder and record.encoder.weights.tensors_sha256[:12],
            "bounds of actions": record.setting.bounds,
        }
        for record in (existing, draft)
    )
    differ = [f"{name}: {old.get(name)}, now {new.get(name)}" for name in differing(old, new)]
    if differ:
        raise OutputExistsError(
            f"{folder} was begun with another configuration ({'; '.join(differ[:4])}); "
            "choose another run, or replace it with --overwrite"
        )
    return existing


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two configurations differ; a run that was begun before an option was there has it off."""
    unknown = {name for name, value in new.items() if name not in old and value in (None, False)}
    return [name for name in sorted({*old, *new} - unknown) if old.get(name) != new.get(name)]


def _clear(folder: Path) -> None:
    """Remove a run's own files, the record last, so that a half-cleared run is still one."""
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    _remove(folder, (CHECKPOINT, BEST, METRICS, *FOUND, RECORD))


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files of these names, in this order."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def listed(home: Path) -> list[dict[str, Any]]:
    """The runs in a folder, the one begun or finished last first; what cannot be read says so in its state."""
    return [_row(record.parent) for record in latest_first(home.glob(f"*/{RECORD}"))]


def _row(folder: Path) -> dict[str, Any]:
    names = ("model", "size", "pvr", "store_id", "updates", "wanted", "loss", "val_loss")
    about: dict[str, Any] = {**dict.fromkeys(names), "run": str(folder), "state": "unreadable"}
    try:
        record, last, done = read_run(folder), newest(folder), updates_done(folder)
    except RunError:
        return about
    return {
        **about,
        "model": record.config["model"],
        "size": record.config["size"],
        "pvr": record.pvr + (" (random weights)" if record.random_weights else ""),
        "store_id": record.store_id,
        "state": record.state,
        "updates": done,
        "wanted": record.config["updates"],
        "loss": last["train"].get("loss"),
        "val_loss": (record.result or {}).get("val", last["val"]).get("loss"),
    }
